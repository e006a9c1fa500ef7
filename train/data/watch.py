"""Noticing that somebody edited a mixture while training runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from cpmbee.errors import CpmBeeError
from cpmbee.train.data.mixture import Mixture, MixtureText, named_scripts, parse_mixture, read_file
from cpmbee.train.data.records import RecordSet

logger = logging.getLogger("cpmbee.train.data")

_Stamp = tuple[tuple[int, int, int] | None, ...]


class MixtureWatch:
    """Looks whether a mixture's files have changed; what is broken is said once and ignored.

    Args:
        text: the mixture as it is used now.
    """

    def __init__(self, text: MixtureText) -> None:
        self.text = text
        self._files: list[Path] = []
        self._stamp: _Stamp = ()  # never equal: an edit since ``text`` was read counts

    def changed(
        self, opened: Mapping[str, RecordSet], try_out: Callable[[Mixture], None]
    ) -> tuple[MixtureText, Mixture] | None:
        """The mixture as it is now, if it was edited since the last call and can be used; else None.

        Args:
            opened: data sets that are open already, by key.
            try_out: makes some samples of a mixture; raises `cpmbee.errors.CpmBeeError` where that cannot be done.
        """
        path = self.text.path
        stamp = tuple(map(_file_stamp, self._files))
        if stamp == self._stamp and self._files:
            return None
        try:
            self._files = [path, *(path.parent / script for script in named_scripts(read_file(path)))]
            self._stamp = tuple(map(_file_stamp, self._files))  # before reading: an edit meanwhile is seen next time
            text = MixtureText.read(path)
            if text == self.text:
                return None
            mixture = parse_mixture(text, opened)
            try_out(mixture)
        except CpmBeeError as error:
            self._stamp = tuple(map(_file_stamp, self._files))
            logger.warning("the edited mixture cannot be used, training goes on with the old one: %s", error)
            return None
        self.text = text
        logger.info("%s: the edited mixture is used from here on", path)
        return text, mixture


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
