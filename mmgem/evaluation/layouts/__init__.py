"""Readers of other people's evaluation data, from local files.

Each receives a folder and gives items whose pictures are read when they are asked for; each refuses, with a UserError
that names the file, what is not as its layout says.
"""
