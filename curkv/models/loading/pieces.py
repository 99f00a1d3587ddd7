"""Tensors that a checkpoint holds as parts of others, or under other names, as tensors of their own."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from curkv.models.config import ModelConfig
from curkv.models.families import family_of
from curkv.models.loading.tensors import TensorFiles


class PieceFiles:
    """The tensors of a model directory as its family names them; see `checkpoint.TensorFiles`."""

    def __init__(self, files: TensorFiles, config: ModelConfig):
        self._files, self._headers, self.mapped = files, files.headers(), files.mapped
        shapes = {name: shape for name, (shape, _) in self._headers.items()}
        self._pieces = family_of(config).pieces(shapes, config)
        sources = {source for piece in self._pieces.values() for source in piece.sources}
        self._headers = {name: header for name, header in self._headers.items() if name not in sources}

    @property
    def names(self) -> list[str]:
        """See `TensorFiles.names`."""
        return [*self._headers, *self._pieces]

    @property
    def paths(self) -> list[Path]:
        """See `TensorFiles.paths`."""
        return self._files.paths

    def place(self, name: str) -> tuple[Path, str]:
        """See `TensorFiles.place`; of a piece its first source."""
        piece = self._pieces.get(name)
        return self._files.place(piece.sources[0] if piece else name)

    def read(self, name: str) -> Tensor:
        """See `TensorFiles.read`."""
        piece = self._pieces.get(name)
        if piece is None:
            return self._files.read(name)
        return piece.take(*map(self._files.read, piece.sources))

    def unread(self, name: str) -> Tensor:
        """See `TensorFiles.unread`."""
        return self.read(name) if name in self._pieces else self._files.unread(name)

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `TensorFiles.headers`; pieces say no dtype."""
        return self._headers | {name: (piece.shape, "") for name, piece in self._pieces.items()}
