"""Models of the Hugging Face hub, asked for only where they can be had.

Without a network huggingface_hub tries again for half a minute, for every file. So whether the hub
answers is asked once a process; where it does not, the process goes on with what was downloaded
before, as HF_HUB_OFFLINE=1 would have it.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path

from shared.errors import UserError, first_line

PATIENCE = 5.0  # seconds; a slow answer takes one


@cache
def unreachable() -> str:
    """Return why the hub is not asked for anything, or an empty string."""
    from huggingface_hub import constants  # slow to import, so only now
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems = [f"{constants.ENDPOINT} does not answer"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
            problems.clear()
        except Exception as error:  # of whichever library the hub's client is built on
            problems[0] = f"{constants.ENDPOINT}: {first_line(error)}"

    asking = threading.Thread(target=ask, daemon=True)  # looking a name up knows no timeout
    asking.start()
    asking.join(PATIENCE)
    if not problems:
        return ""
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes to come
    return problems[0]


def hub_file(repository: str, file: str) -> Path:
    """Get a file of a model's repository, downloaded or found where earlier downloads are kept.

    Raises UserError that says what to do: for a name that is not there, a repository that wants a
    login, a hub that cannot be reached.
    """
    away = unreachable()
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except GatedRepoError:
        why = f"accept its terms on {constants.ENDPOINT}/{repository}, then `hf auth login`"
    except RepositoryNotFoundError:
        why = "the hub has no such repository, or a private one: check the name, or `hf auth login`"
    except (EntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            why = f"it has no {file}: a diffusers model is expected"
        elif away:
            raise UserError(
                f"model {repository!r} is not on this machine and the hub is out of reach "
                f"({away}); where there is a network: hf download {repository} --local-dir FOLDER; "
                "then pass that folder as --model"
            ) from None
        else:
            why = f"{first_line(error)}; check the name and your connection, or pass a local folder"
    raise UserError(f"model {repository!r} cannot be read from the hub: {why}")


def is_downloaded(repository: str, file: str) -> bool:
    """Is the file among earlier downloads?"""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file), str)
