"""Block-wise masks of FLAVA in transformers, which are those of BEiT: 75 of 14 x 14 patches, filled up at random.

Prints means over the given number of masks: pairs of neighbors that are both hidden, hidden patches in the middle 6 x 6,
and hidden patches at the border.
"""
import json
import random
import sys

import numpy
from transformers.models.flava.image_processing_flava import FlavaMaskingGenerator

random.seed(1)
generator = FlavaMaskingGenerator(14, total_mask_patches=75, mask_group_min_patches=16, mask_group_max_patches=75)
border = numpy.ones((14, 14), bool)
border[1:13, 1:13] = False
features = []
for _ in range(int(sys.argv[1])):
    mask = numpy.asarray(generator()).astype(bool)
    free = [tuple(patch) for patch in numpy.argwhere(~mask)]
    for patch in random.sample(free, 75 - int(mask.sum())):
        mask[patch] = True
    pairs = (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
    features.append([pairs, mask[4:10, 4:10].sum(), mask[border].sum()])
print(json.dumps(numpy.mean(features, 0).tolist()))
