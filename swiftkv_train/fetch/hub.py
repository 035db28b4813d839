"""A model from the Hugging Face hub, or from its local cache when offline."""

from __future__ import annotations

import re
from pathlib import Path

from swiftkv_train.errors import UserError
from swiftkv_train.fetch.local import COMPANIONS
from swiftkv_train.loading import one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Never pickled weights; no copies of the model in other formats that some repositories keep beside it.
ALLOW = ["*.safetensors", "*.safetensors.index.json", *COMPANIONS]
IGNORE = ["*/*", "consolidated*"]


def snapshot(hub_id: str, revision: str | None) -> Path:
    """A directory of the hub's cache that holds the model's files; its name is the commit.

    A download that was cut off goes on where it stopped. Raises UserError, in one line, for whatever the hub refuses.
    """
    import huggingface_hub
    from huggingface_hub import errors

    at = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(
            huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=ALLOW, ignore_patterns=IGNORE)
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{hub_id} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{hub_id} is neither a local directory nor a model on the hub; check the name, "
            "or `hf auth login` if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{hub_id} has no revision {revision}; name one of its branches, tags or commits") from None
    except errors.HFValidationError as error:
        raise UserError(f"{hub_id} is not a hub id: {error}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{at} is not in the local cache and the hub cannot be reached; connect (unset HF_HUB_OFFLINE) "
            "or name a local directory"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {at}: {one_line(error)}") from None
    except Exception as error:
        # Which library talks to the network has changed between versions of huggingface_hub.
        library = type(error).__module__.split(".")[0]
        if library in ("httpx", "httpcore", "requests") or isinstance(error, ConnectionError | TimeoutError):
            raise UserError(
                f"the hub cannot be reached for {at}: {one_line(error)}; try again or name a local directory"
            ) from None
        raise
