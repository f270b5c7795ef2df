"""The client of the Hugging Face Hub: tokens, repositories, and errors in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, SpaceInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id


def hub_client(token: str | None = None) -> HfApi:
    """Returns a client of the Hub, or raises `ValueError` if there is no token or it is malformed.

    The default token is HF_TOKEN or the token of the stored login.
    """
    token = (token or get_token() or "").strip()
    if not token:
        raise ValueError(
            "Pushing to the Hub needs a token. Log in with `hf auth login`, or set HF_TOKEN to a token that "
            "may write (https://huggingface.co/settings/tokens)."
        )
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would refuse it, and quote it
        raise ValueError("The token of the Hub must not have spaces or control characters.")
    return HfApi(token=token)


def hub_id(name: Any) -> str | None:
    """Returns `name` if `name` can be the id of a repository on the Hub, and `None` if it is a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else name


def full_repo_id(repo_id: str, api: HfApi) -> str:
    """Returns `"USER/NAME"` for the `"NAME"` of a repository of the token's owner."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def check_card(text: str, api: HfApi) -> None:
    """Raises `HfHubHTTPError` if the Hub does not accept the metadata of a card; every commit checks them."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"repoType": "model", "content": text},
        headers=build_hf_headers(token=api.token),
    )
    hf_raise_for_status(response)


def create_repository(
    repo_id: str, private: bool | None = None, token: str | None = None, repo_type: str = "model"
) -> ModelInfo | SpaceInfo:
    """Creates a repository if it does not exist, and checks that the token may write to it.

    The default of `private` follows the settings of the owner. `repo_type` is `"model"`, or `"space"` for a
    Space with Gradio. The result describes the repository, with its full `id`, and its files as `siblings`.

    Raises:
        ValueError: if there is no token, if the id is malformed, or if `private` is true and the repository
            already exists and is public.
        OSError: if the Hub cannot be reached, or if the token may not write to the repository.
    """
    api = hub_client(token)
    with readable_errors(repo_id, api):
        sdk = "gradio" if repo_type == "space" else None
        repo_id = api.create_repo(
            repo_id, private=private, repo_type=repo_type, exist_ok=True, space_sdk=sdk
        ).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        info = api.space_info(repo_id) if repo_type == "space" else api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"The repository {repo_id!r} already exists and is public. Make it private in its settings, or "
            "choose another name."
        )
    return info


@contextmanager
def readable_errors(repo_id: str, api: HfApi) -> Iterator[None]:
    """Turns every exception of `huggingface_hub` into an error of one line that does not show the token."""
    try:
        yield
    except Exception as error:  # HTTP, connections, upload threads and malformed answers all raise their own
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # a thread raised the cause
            cause = cause.__cause__
        raise readable_error(cause, repo_id, api) from None


def readable_error(error: BaseException, repo_id: str, api: HfApi) -> ValueError | OSError:
    """Returns an error that says what went wrong on the Hub and, where that is known, what would be right."""
    if isinstance(error, HFValidationError):
        return ValueError(
            f"{repo_id!r} is not the id of a repository. It must be NAME or USER/NAME, of letters, digits, "
            "'-', '_' and '.'."
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return PermissionError(
            f"The Hub refused the token for {repo_id!r}. Log in with `hf auth login`, or set HF_TOKEN to a "
            "valid token that may write."
        )
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo_id!r}. Use a token that may write, or another repository."
        )
    message = getattr(error, "server_message", None) or str(error)
    message = " ".join(message.replace(str(api.token), "…").split())
    if status is not None:
        return OSError(f"The Hub answered {status} for {repo_id!r}: {message}")
    if isinstance(error, (ValueError, OSError)):
        return OSError(f"{repo_id!r} could not be written: {message}")
    return ConnectionError(f"The connection to {api.endpoint} failed: {type(error).__name__}: {message}")
