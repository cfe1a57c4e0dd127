"""Whether the Hugging Face hub can be reached, found out once: its client would try for 40 seconds, for each file."""
import functools
import os
import threading

SECONDS = 3.0


@functools.cache
def without_network() -> str:
    """Say why the hub can't be reached, or ""; its libraries then take their cache."""
    from huggingface_hub import constants, get_session
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    met = [f"no answer in {SECONDS:g} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)  # any status is an answer
            met[0] = ""
        except Exception as error:  # the client's library changed with its versions
            met[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)  # a name server can take longer than any time-out
    thread.start()
    thread.join(SECONDS)
    if met[0]:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are loaded later, and other processes
        return f"no network: {constants.ENDPOINT} can't be reached ({met[0]})"
    return ""
