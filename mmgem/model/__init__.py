"""The model. Knows nothing of training, files of data, or ranks.

Shape suffixes, here and everywhere:

    B  images of the batch         R  regions of the batch        M  texts of the batch (captions, then phrases)
    C  width of the tower          H W  grid of the map           S  side of the tower's picture
    n L  packed rows, their length T  tokens (labels, words)      N  any number (tokens of all rows, vectors)
    D  width of the LLM            E  width of the embedding      G  global batch
"""

from mmgem.model.mmgem import MMGem, Output

__all__ = ["MMGem", "Output"]
