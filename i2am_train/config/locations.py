"""Where files of options, weights and datasets lie: shipped ones (in a checkout or a wheel), the user's, the hub's.

Where the Hugging Face hub is, and who asks, huggingface_hub knows (``hf auth login``, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.types import GridSize

PACKAGE = Path(__file__).resolve().parent.parent

SHIPPED_CHECKPOINT = "tiny"
"""Name by which ``init`` and ``checkpoint`` mean the weights that come with the package."""
HUB = "hub:"
"""Begin of a checkpoint's name that means a model on the hub."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def absolute(path: Path) -> Path:
    """The path from the root on, with the user's home folder for ``~`` as in ``expanded``.

    >>> absolute(Path("/runs/a")), absolute(Path("a")) == Path.cwd() / "a"
    (PosixPath('/runs/a'), True)
    """
    return expanded(path).absolute()


def expanded(path: str | Path) -> Path:
    """The path with the user's home folder for ``~``.

    Raises:
        ConfigError: ``~name``, and there is no such user.

    >>> expanded("~/a") == Path.home() / "a", expanded("a")
    (True, PosixPath('a'))
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"The path {path} is not possible: there is no user {path.parts[0][1:]}. A folder of that name is ./{path}."
        ) from error


def checkout() -> Path:
    """The folder that the package lies in: the root of the repository, in a checkout."""
    return PACKAGE.parent


def conf_folder() -> Path:
    """The folder of the Hydra files: inside the package in a wheel, beside it in a checkout.

    >>> (conf_folder() / "experiment" / "refined.yaml").is_file()
    True
    """
    return checkout() / "conf" if _in_checkout() else PACKAGE / "conf"


def weights_folder() -> Path:
    """The folder of the shipped weights; one checkpoint folder per name in it.

    >>> (weights_folder() / SHIPPED_CHECKPOINT).is_dir()
    True
    """
    return checkout() / "data" / "weights" if _in_checkout() else PACKAGE / "weights"


def _in_checkout() -> bool:
    """True if the package runs from a checkout (also if installed editable), not from a wheel."""
    return not (PACKAGE / "conf").is_dir()


def experiment_names(options: Collection[str]) -> list[str]:
    """Names of the files in ``conf/experiment`` that set only the given top-level options.

    >>> experiment_names(["name", "label", "objective"])[:3]
    ['atv', 'baseline', 'capped']
    """
    names = []
    for path in sorted((conf_folder() / "experiment").glob("*.yaml")):
        # The top-level keys, without the cost of a YAML reader: --help lists these names.
        keys = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
        if set(keys) <= {"defaults", *options}:
            names.append(path.stem)
    return names


def dataset_folder(size: GridSize, train: int, test: int, seed: int) -> Path:
    """Where the embedded dataset of these settings is made and looked for.

    In a checkout ``data/synthetic-...``; for an installed package the user's cache folder.

    >>> dataset_folder(GridSize(64, 48), 20, 10, seed=3).name
    'synthetic-64x48-train20-test10-seed3'
    """
    return _made_data(f"synthetic-{size}-train{train}-test{test}-seed{seed}")


def shapes_folder(images: int) -> Path:
    """Where the made set of shapes in COCO's layout lies, or will lie.

    >>> shapes_folder(24).name
    'shapes-coco-24'
    """
    return _made_data(f"shapes-coco-{images}")


def _made_data(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (checkout() / "data" if _in_checkout() else cache / "i2am_train") / name


def checkpoint_folder(name: str) -> Path:
    """The folder that ``init`` or ``checkpoint`` means: a shipped name, a path, or ``hub:USER/NAME[@REVISION]``.

    Raises:
        CheckpointError: there is no such folder, or no such model on the hub.

    >>> checkpoint_folder("tiny") == weights_folder() / "tiny"
    True
    """
    if name == SHIPPED_CHECKPOINT:
        return weights_folder() / name
    if name.startswith(HUB):
        return pull(name)
    folder = absolute(Path(name))
    if not folder.is_dir():
        found = f"{folder} is a file, and a checkpoint is a folder"
        if not folder.exists():
            found = f"There is no checkpoint folder {folder}"
        raise CheckpointError(
            f"{found}. Give the folder of a saved model or of "
            f"a run, '{SHIPPED_CHECKPOINT}' for the shipped weights, or {HUB}USER/NAME."
        )
    return folder


def pull(name: str) -> Path:
    """The folder of ``hub:USER/NAME`` or ``hub:USER/NAME@REVISION`` in the hub's cache, downloaded if it is not there.

    Raises:
        CheckpointError: the name is none, there is no such model, or it can be neither reached nor found in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not _HUB_NAME.fullmatch(repository):
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

    >>> revisions("tiny", None)
    {}
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
    if not _HUB_NAME.fullmatch(repository):
        return None
    try:
        folder = snapshot_download(repository, revision=revision or None, local_files_only=True, allow_patterns=[])
    except (HFValidationError, LocalEntryNotFoundError):
        return None
    return Path(folder).name


def require_login(name: str) -> None:
    """Fails where nothing could be pushed as the model ``name``: asks the hub before the work, not after it.

    Raises:
        ConfigError: ``name`` is not of the form USER/NAME.
        CheckpointError: nobody is logged in, or the hub cannot be reached.

    >>> require_login("refined")
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: push=refined is not possible: expected USER/NAME.
    """
    from huggingface_hub import HfApi

    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"push={name} is not possible: expected USER/NAME.")
    with _hub_errors(f"pushed to {name} (nothing was written)"):
        HfApi().whoami()


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
    except LocalTokenNotFoundError as error:
        raise _failed(what, "nobody is logged in to the hub", "Log in with 'hf auth login'.") from error
    except RepositoryNotFoundError as error:
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
