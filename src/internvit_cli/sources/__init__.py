"""Turn folders, files, globs and lists into one sorted listing of keys, and open what lies there."""

from internvit_cli.sources.discover import discover
from internvit_cli.sources.interface import DiscoverOptions, FolderProblem, Listing, Source

__all__ = ["DiscoverOptions", "FolderProblem", "Listing", "Source", "discover"]
