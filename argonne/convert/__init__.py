"""Models in the forms that others keep them in: the original's files, Hugging Face's, PyTorch's and llama.cpp's."""

from argonne.convert.conversion import ConvertFlags, convert
