"""A Google Cloud of the tests' own: the methods of Compute Engine, IAM and Resource Manager that Ray's node provider calls.

with google_cloud(folder, project="my-project") as cloud: ...      # cloud.environment: for Google's client libraries

Use one for a whole module, with `cloud.clear()`: httplib2 reads the name of the certificate's file when it is imported.
Google's real client connects through a proxy on this machine, which answers in place of googleapis.com. Request bodies
are checked against the discovery documents that Google publishes with its client: unknown fields, wrong types and
unknown values of enumerations are refused with status 400, as Compute Engine does.
"""

import contextlib
import datetime
import functools
import http.server
import json
import re
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import googleapiclient
import jsonschema
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

HOSTS = ["compute", "iam", "cloudresourcemanager", "oauth2"]
DOCUMENTS = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"


@dataclass
class GoogleCloud:
    project: str
    environment: dict[str, str] = field(default_factory=dict)
    instances: dict[str, dict] = field(default_factory=dict)
    accounts: set[str] = field(default_factory=set)
    """Service accounts that exist, by e-mail address."""
    bindings: list[dict] = field(default_factory=list)
    metadata: dict = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    """Names of the methods that were called, such as instances.insert."""

    def clear(self) -> None:
        for state in (self.instances, self.accounts, self.bindings, self.metadata, self.calls):
            state.clear()

    def answer(self, host: str, verb: str, path: str, query: dict[str, str], body: dict) -> dict:
        """The response to a request. Raises ValueError for one that Google refuses."""
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, f"{verb} {host}{path}"):
                self.calls.append(method.__name__.replace("_", ".", 1))
                return method(self, *match.groups(), query=query, body=body)
        raise ValueError(f"not in this cloud: {verb} {host}{path}")

    # ------------------------------------------------------------ Resource Manager and IAM

    def projects_get(self, project: str, **_: Any) -> dict:
        return {"projectId": project, "name": project, "lifecycleState": "ACTIVE"}

    def projects_getIamPolicy(self, project: str, **_: Any) -> dict:
        return {"bindings": self.bindings}

    def projects_setIamPolicy(self, project: str, body: dict, **_: Any) -> dict:
        check("cloudresourcemanager.v1", "SetIamPolicyRequest", body)
        self.bindings = body["policy"]["bindings"]
        return body["policy"]

    def serviceAccounts_get(self, email: str, **_: Any) -> dict:
        if email not in self.accounts:
            raise KeyError(email)
        return {"email": email, "projectId": self.project}

    def serviceAccounts_create(self, project: str, body: dict, **_: Any) -> dict:
        check("iam.v1", "CreateServiceAccountRequest", body)
        email = f"{body['accountId']}@{project}.iam.gserviceaccount.com"
        self.accounts.add(email)
        return {"email": email, "projectId": project}

    # ------------------------------------------------------------ Compute Engine

    def compute_project(self, project: str, **_: Any) -> dict:
        return {"name": project, "commonInstanceMetadata": self.metadata}

    def compute_setMetadata(self, project: str, body: dict, **_: Any) -> dict:
        check("compute.v1", "Metadata", body)
        self.metadata = body
        return {"name": "operation-metadata", "status": "RUNNING"}

    def subnetworks_list(self, region: str, **_: Any) -> dict:
        return {"items": [{"selfLink": f"projects/{self.project}/regions/{region}/subnetworks/default"}]}

    def operations_get(self, name: str, **_: Any) -> dict:
        return {"name": name, "status": "DONE"}

    def instances_insert(self, zone: str, body: dict, **_: Any) -> dict:
        check("compute.v1", "Instance", body)
        for account in body.get("serviceAccounts", []):
            if account["email"] not in self.accounts:
                raise ValueError(f"the service account {account['email']} does not exist")
        made = {**body, "status": "RUNNING", "labelFingerprint": "0", "zone": f"zones/{zone}"}
        made["networkInterfaces"] = [
            {**card, "networkIP": f"10.0.0.{len(self.instances) + 2}"} for card in body["networkInterfaces"]
        ]
        self.instances[body["name"]] = made
        return {"name": f"operation-{body['name']}", "status": "RUNNING"}

    def instances_list(self, zone: str, query: dict[str, str], **_: Any) -> dict:
        wanted = dict(re.findall(r"\(labels\.([\w-]+) = ([\w-]+)\)", query["filter"]))
        states = re.findall(r"status = (\w+)", query["filter"])
        found = [one for one in self.instances.values() if one["status"] in states]
        return {"items": [one for one in found if wanted.items() <= one["labels"].items()]}

    def instances_get(self, zone: str, name: str, **_: Any) -> dict:
        return self.instances[name]

    def instances_setLabels(self, zone: str, name: str, body: dict, **_: Any) -> dict:
        check("compute.v1", "InstancesSetLabelsRequest", body)
        self.instances[name]["labels"] = body["labels"]
        return {"name": f"operation-{name}", "status": "RUNNING"}

    def instances_delete(self, zone: str, name: str, **_: Any) -> dict:
        del self.instances[name]
        return {"name": f"operation-{name}", "status": "RUNNING"}


_COMPUTE = r"compute/compute/v1/projects/[\w-]+"
_MANAGER = r"cloudresourcemanager/v1/projects/([\w-]+)"
ROUTES = {
    rf"GET {_MANAGER}": GoogleCloud.projects_get,
    rf"POST {_MANAGER}:getIamPolicy": GoogleCloud.projects_getIamPolicy,
    rf"POST {_MANAGER}:setIamPolicy": GoogleCloud.projects_setIamPolicy,
    r"GET iam/v1/projects/[\w-]+/serviceAccounts/(.+)": GoogleCloud.serviceAccounts_get,
    r"POST iam/v1/projects/([\w-]+)/serviceAccounts": GoogleCloud.serviceAccounts_create,
    r"GET compute/compute/v1/projects/([\w-]+)": GoogleCloud.compute_project,
    r"POST compute/compute/v1/projects/([\w-]+)/setCommonInstanceMetadata": GoogleCloud.compute_setMetadata,
    rf"GET {_COMPUTE}/regions/([\w-]+)/subnetworks": GoogleCloud.subnetworks_list,
    rf"GET {_COMPUTE}/(?:global|zones/[\w-]+)/operations/([\w-]+)": GoogleCloud.operations_get,
    rf"POST {_COMPUTE}/zones/([\w-]+)/instances": GoogleCloud.instances_insert,
    rf"GET {_COMPUTE}/zones/([\w-]+)/instances": GoogleCloud.instances_list,
    rf"GET {_COMPUTE}/zones/([\w-]+)/instances/([\w-]+)": GoogleCloud.instances_get,
    rf"POST {_COMPUTE}/zones/([\w-]+)/instances/([\w-]+)/setLabels": GoogleCloud.instances_setLabels,
    rf"DELETE {_COMPUTE}/zones/([\w-]+)/instances/([\w-]+)": GoogleCloud.instances_delete,
}


# ---------------------------------------------------------------- request bodies


@functools.cache
def schemas(document: str) -> dict:
    return json.loads((DOCUMENTS / f"{document}.json").read_text())["schemas"]


def check(document: str, name: str, body: dict) -> None:
    """Raises ValueError for a body that does not match the schema of a discovery document."""
    validator = jsonschema.Draft202012Validator(
        {"$defs": {key: as_json_schema(value) for key, value in schemas(document).items()}, "$ref": f"#/$defs/{name}"}
    )
    for error in validator.iter_errors(body):
        raise ValueError(f"{name}: {error.json_path}: {error.message}")


def as_json_schema(node: dict) -> dict:
    """A schema of a discovery document as JSON Schema that refuses unknown fields."""
    if "$ref" in node:
        return {"$ref": f"#/$defs/{node['$ref']}"}
    if node.get("type") == "array":
        return {"type": "array", "items": as_json_schema(node["items"])}
    if "properties" in node:
        properties = {key: as_json_schema(value) for key, value in node["properties"].items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if node.get("type") == "object":
        return {"type": "object", "additionalProperties": as_json_schema(node.get("additionalProperties", {}))}
    if node.get("format") in ("int64", "uint64"):  # Google accepts them with and without quotation marks
        return {"type": ["string", "integer"]}
    return {key: node[key] for key in ("type", "enum") if key in node and node[key] != "any"}


# ---------------------------------------------------------------- the server


@contextlib.contextmanager
def google_cloud(folder: Path, project: str) -> Iterator[GoogleCloud]:
    """Yields an empty project. `cloud.environment` has the variables with which Google's clients reach it."""
    cloud = GoogleCloud(project)
    tls = certificate(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            self.host = self.path.partition(".googleapis.com")[0]
            self.send_response(200)
            self.end_headers()
            self.connection = tls.wrap_socket(self.connection, server_side=True)
            self.rfile = self.connection.makefile("rb")
            self.wfile = self.connection.makefile("wb", 0)
            self.close_connection = False

        def do(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.host == "oauth2":
                return self.reply(200, {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"})
            if self.headers["Authorization"] != "Bearer token":
                return self.reply(401, {"error": {"code": 401, "message": "no credentials"}})
            query = dict(urllib.parse.parse_qsl(url.query))
            try:
                path = urllib.parse.unquote(url.path)
                self.reply(200, cloud.answer(self.host, self.command, path, query, json.loads(text or "{}")))
            except KeyError as error:
                self.reply(404, {"error": {"code": 404, "message": f"{error} was not found"}})
            except ValueError as error:
                self.reply(400, {"error": {"code": 400, "message": str(error)}})

        do_GET = do_POST = do_DELETE = do

        def reply(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cloud.environment = {
        "HTTPS_PROXY": f"http://127.0.0.1:{server.server_port}",
        "HTTPLIB2_CA_CERTS": str(folder / "authority.pem"),
        "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "key.json"),
    }
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()


def certificate(folder: Path) -> ssl.SSLContext:
    """Writes a certificate for googleapis.com (authority.pem) and the key of a service account (key.json)."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"{h}.googleapis.com") for h in HOSTS]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    (folder / "authority.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_text(pem + (folder / "authority.pem").read_text())
    account = {"type": "service_account", "client_email": "operator@tests", "private_key": pem, "private_key_id": "1"}
    account |= {"token_uri": "https://oauth2.googleapis.com/token", "project_id": "my-project", "client_id": "1"}
    (folder / "key.json").write_text(json.dumps(account))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context
