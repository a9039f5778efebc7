"""Histograms of oriented gradients by scikit-image: reads `x` [Y, X] from a safetensors file, prints cells [rows, columns, 9]."""
import json
import sys

from safetensors.numpy import load_file
from skimage.feature import hog

x = load_file(sys.argv[1])["x"]
cells = hog(x, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2", feature_vector=False)
print(json.dumps(cells[:, :, 0, 0].tolist()))
