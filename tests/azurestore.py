"""An Azure Blob Storage for tests: Azurite, a package of npm.

    npm install azurite                           # in a folder outside the project
    export VIT_AZURITE=FOLDER/node_modules/.bin/azurite-blob

with azurite(program, folder) as endpoint: ...    # AZURE_STORAGE_CONNECTION_STRING is CONNECTION_STRING.format(endpoint)
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from azure.storage.blob import BlobServiceClient

from tests.ports import free_port, wait_until_listening

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
ACCOUNT = "devstoreaccount1"  # of Azurite; its key is a public constant
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
CONNECTION_STRING = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={{}}/{ACCOUNT};"


@contextlib.contextmanager
def azurite(program: str, folder: Path) -> Iterator[str]:
    """Yields the address of a new, empty store that keeps its data under `folder`."""
    endpoint = f"http://127.0.0.1:{(port := free_port())}"
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command = [program, *options, "--skipApiVersionCheck", "--silent", "--disableTelemetry"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_listening(port, process)
        yield endpoint
    finally:
        process.terminate()
        process.wait(10)


def make_container(endpoint: str, name: str) -> None:
    """A container in the store at `endpoint`."""
    with BlobServiceClient.from_connection_string(CONNECTION_STRING.format(endpoint)) as client:
        client.create_container(name)
