"""Two-dimensional sine-cosine positions with numpy, in double precision: positions.py OUT ROWS COLS WIDTH"""
import sys

import numpy
from safetensors.numpy import save_file

out, rows, cols, width = sys.argv[1], *map(int, sys.argv[2:5])
omega = 1.0 / 10000 ** (numpy.arange(width // 4, dtype=numpy.float64) / (width / 4))


def line(at):
    angles = numpy.outer(at.reshape(-1), omega)
    return numpy.concatenate([numpy.sin(angles), numpy.cos(angles)], axis=1)


y, x = numpy.meshgrid(numpy.arange(rows), numpy.arange(cols), indexing="ij")
save_file({"positions": numpy.concatenate([line(x), line(y)], axis=1).astype(numpy.float32)}, out)
