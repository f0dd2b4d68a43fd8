"""What can be walked: directories, files, globs and lists become one sorted listing of keys."""

from internvit_cli.sources.discover import discover
from internvit_cli.sources.interface import DiscoverOptions, FolderProblem, Listing, Source

__all__ = ["DiscoverOptions", "FolderProblem", "Listing", "Source", "discover"]
