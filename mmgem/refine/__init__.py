"""Raw data → trustworthy data.

raw.py       tars and folders in which a text may be wrong, or either half may be missing
encoders.py  how near a picture and a text are, by encoders of different kinds
gate.py      their scores as one, and the threshold
makers.py    what writes a text for a picture, and draws a picture for a text
work.py      what becomes of each sample, a unit of the source at a time, and kept: a stopped run goes on
run.py       the whole: units → what becomes of them → near-duplicates out → shards
page.py      the scores and what each threshold keeps, to look at
"""
