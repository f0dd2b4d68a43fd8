"""Find the images of a command's sources, or explain why there are none."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, BinaryIO

from internvit_cli.config import Status
from internvit_cli.errors import InternvitError, NoImagesError, one_line
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.sources import Listing, discover

if TYPE_CHECKING:
    from internvit_cli.options import ExtractOptions

EMPTY_LISTING = Listing((), [], array("I"), {}, (), 0)


def find_images(options: ExtractOptions, stdin: BinaryIO | None, observer: Observer = SILENT) -> Listing:
    """Return the listing of a command's sources.

    Raises:
        NoImagesError: The sources hold no pictures.
        InternvitError: The sources are only lists, and no file in them exists.
    """
    with observer.phase("looking for images"):
        listing = require_images(discover(options.sources, options.discover, stdin))
    if listing.is_missing:
        raise InternvitError(listing.missing_lists[0].message, listing.missing_lists[0].hint)
    return listing


def require_images(listing: Listing) -> Listing:
    """Return the listing unless it is empty.

    Raises:
        NoImagesError: The listing is empty; the error says what the sources hold instead.
    """
    if len(listing) or listing.unreadable_folders:
        return listing
    if listing.empty_lists and not listing.left_out.total:
        name = one_line(listing.empty_lists[0]) or "on standard input"
        raise NoImagesError(f"the list {name} is empty", "list the paths of pictures, one per line")
    error = listing.left_out.no_images("no pictures found in the given sources")
    if listing.unfollowed_links and not listing.left_out.total:
        links = counted(listing.unfollowed_links, "link")
        raise NoImagesError(error.message, f"{links} to folders were not followed: --follow-links follows them")
    raise error


def listing_notes(listing: Listing, drawn_and_named: int) -> list[str]:
    """Return notes on the sources for the user.

    Args:
        listing: The files that were found.
        drawn_and_named: The number of pictures that internvit drew, and that are taken because the user named them.
    """
    notes = [f"{missing.message}: {missing.hint}" for missing in listing.missing_lists]
    notes += listing.notes
    if listing.unfollowed_links:
        notes.append(
            f"{counted(listing.unfollowed_links, 'link')} to folders not followed (--follow-links follows them)"
        )
    outside = sum(skipped.status is Status.LINK_OUTSIDE for skipped in listing.skipped.values())
    if outside:
        notes.append(f"{counted(outside, 'link')} out of the sources not followed (--follow-links reads them)")
    if drawn_and_named:
        notes.append(
            f"{counted(drawn_and_named, 'picture')} drawn by internvit itself, taken because the sources name them"
        )
    return notes
