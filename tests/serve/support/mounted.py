"""Files as Kubernetes mounts them."""

from itertools import count
from pathlib import Path
from shutil import rmtree


class Mounted:
    """A directory like that of a ConfigMap or a Secret: each file is a link through the link `..data`."""

    def __init__(self, directory: Path, **files: str) -> None:
        directory.mkdir()
        self._directory = directory
        self._data = directory / "..data"
        self._versions = count()
        self.swap(**files)
        for name in files:
            (directory / name).symlink_to(Path("..data") / name)

    def path(self, name: str) -> Path:
        return self._directory / name

    def swap(self, **files: str) -> None:
        """Replace all files at once."""
        version = self._directory / f"..{next(self._versions)}"
        version.mkdir()
        for name, text in files.items():
            (version / name).write_text(text)
        link = self._directory / "..data_tmp"
        link.symlink_to(version.name)
        before = self._directory / self._data.readlink() if self._data.is_symlink() else None
        link.rename(self._data)
        if before is not None:
            rmtree(before)

    def rename_over(self, name: str, text: str) -> None:
        """Replace one file behind its links."""
        new = self._data / f"{name}.new"
        new.write_text(text)
        new.rename(self._data / name)

    def remove(self, name: str) -> None:
        (self._data / name).unlink()
