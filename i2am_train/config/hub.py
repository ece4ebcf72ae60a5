"""Models on the Hugging Face hub: fetched by name where a checkpoint is asked for, and pushed by ``i2am export``.

Where the hub is, and who asks, huggingface_hub knows (``hf auth login``, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from i2am_train.errors import CheckpointError, ConfigError

HUB = "hub:"
"""Begin of a checkpoint's name that means a model on the hub."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def pull(name: str) -> Path:
    """The folder of ``hub:USER/NAME`` or ``hub:USER/NAME@REVISION`` in the hub's cache, downloaded if it is not there.

    Raises:
        CheckpointError: the name is none, there is no such model, or it can be neither reached nor found in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not NAME.fullmatch(repository):
        raise CheckpointError(f"'{name}' names no model on the hub. Write {HUB}USER/NAME[@REVISION].")
    with _hub_errors(f"fetched ({name})"):
        return Path(snapshot_download(repository, revision=revision or None))


def require_model(name: str, revision: str | None = None) -> None:
    """Asks the hub once for a model that is not in its cache: before libraries ask six times for each of its files.

    Their pauses in between come to 25 seconds a file where there is no network, and nothing sets them.

    Raises:
        CheckpointError: the name is none of the hub's, there is no such model or revision, or the hub does not answer.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Of no files: those that are needed may be there, and the rest not.
        snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[])
    except HFValidationError as error:
        raise CheckpointError(
            f"There is no file or folder '{name}', and it is no name on the hub either (OWNER/NAME, or "
            "OWNER/NAME@REVISION). Check the path."
        ) from error
    except LocalEntryNotFoundError:
        shown = name if revision is None else f"{name}@{revision}"
        with _hub_errors(f"fetched ({shown}; there is no such folder here either)"):
            HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)


def revisions(*names: str | None) -> dict[str, dict[str, str]]:
    """For a run's settings: the commits of those models that came from the hub, by name; empty if none did.

    A branch moves on; a run that is asked for again must not go on with other weights.
    """
    found = {name: commit for name in names if name is not None and (commit := _commit(name))}
    return {"revisions": found} if found else {}


def _commit(name: str) -> str | None:
    """The commit of a model that was fetched, OWNER/NAME[@REVISION] with or without ``hub:``; else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).expanduser().exists():
        return None
    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not NAME.fullmatch(repository):
        return None
    try:
        folder = snapshot_download(repository, revision=revision or None, local_files_only=True, allow_patterns=[])
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(folder).name


def check_repository(name: str) -> None:
    """Fails where ``name`` is not of the form USER/NAME."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"push={name} is not possible: expected USER/NAME.")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder as the model ``name``, made if it does not exist; the address of the commit.

    Raises:
        CheckpointError: nobody is logged in, the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(f"pushed to {name} (it lies in {folder})"):
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model exported by i2am_train")
    return str(commit.commit_url)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        reason, advice = "there is no such revision", "Give a branch, tag or commit of it after @."
        raise _failed(what, reason, advice) from error
    except (RepositoryNotFoundError, LocalTokenNotFoundError) as error:
        reason = "there is no such model, or it is private and whoever is logged in may not see it"
        raise _failed(what, reason, "Check the name, and log in with 'hf auth login'.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status} ({' '.join(str(error).split())[:200]})"
        advice = "Log in with 'hf auth login'." if status in (401, 403) else "Try again later."
        raise _failed(what, reason, advice) from error
    except Exception as error:  # connections fail in the words of whichever library makes them
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = (
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE. A model in the hub's cache needs no network, nor does "
            "the folder that 'hf download OWNER/NAME --local-dir FOLDER' made elsewhere."
        )
        raise _failed(what, f"{type(error).__name__}: {first_line}", advice) from error


def _failed(what: str, reason: str, advice: str) -> CheckpointError:
    return CheckpointError(f"The model could not be {what}: {reason}. {advice}")
