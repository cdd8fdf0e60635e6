"""What the Hugging Face hub's client raises, said in one clause."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Why something could not be fetched from the hub, as a clause for an error message."""
    from huggingface_hub import errors

    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def has(*kinds) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if has(errors.GatedRepoError):
        return "the hub asks for its terms to be accepted first (and for a token)"
    if has(errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if has(errors.RepositoryNotFoundError):
        return "the hub has no such repository, or keeps it private (a token opens it)"
    if has(errors.RemoteEntryNotFoundError):
        return "the hub's repository lacks a file that is needed"
    if has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) or any(
        type(e).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError") for e in chain
    ):  # the HTTP library's
        return "there is no such folder, it is not in the cache, and the Hugging Face hub could not be reached"
    return " ".join(str(error).split())[:300] or type(error).__name__
