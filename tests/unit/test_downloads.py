"""Downloads from a server that misbehaves: every address ends as an image or as a reason, in bounded time and memory."""

import asyncio
import errno
import fcntl
import ipaddress
import itertools
import multiprocessing
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter

import pytest

from pipeline.data.codecs import Refused
from pipeline.data.downloads import bodies, limits, robots, stream
from pipeline.data.downloads.addresses import AddressPolicy, CheckedResolver, RefusedAddress
from pipeline.data.downloads.config import DownloadConfig, check_downloads, is_temporary
from pipeline.data.downloads.fetch import Fetcher
from pipeline.data.downloads.limits import HostLimits
from pipeline.data.downloads.stream import download
from pipeline.errors import NotWritten, UserError
from tests.images import jpeg
from tests.webserver import IMAGE, LARGE, web_server

FAST = {"retries": 0, "timeout": 5.0, "stall_timeout": 0.5, "connect_timeout": 2.0, "max_bytes": 1 << 20}


@pytest.fixture
def server():
    with web_server() as running:
        yield running


def fetch(*addresses, private=True, **options):
    """The outcome of each address: bytes, or its reason."""
    results = download(addresses, DownloadConfig(**FAST | options), allow_private=private)
    return [result if isinstance(result, bytes) else result.reason for result in results]


ANSWERS = {
    "image/1.jpg": jpeg(1),
    "gzip/1.jpg": IMAGE,
    "deflate/1.jpg": IMAGE,
    "rawdeflate/1.jpg": IMAGE,
    "status/404": "http 404",
    "status/410": "http 410",
    "status/403": "http 403",
    "status/500": "http 500",
    "status/204": "http 204",
    "html/1.jpg": "not an image",
    "silent/1.jpg": "timeout",
    "endless/1.jpg": "too many bytes",
    "huge/1.jpg": "too many bytes",
    "bomb/1.jpg": "not an image",
    "imagebomb/1.jpg": "too many bytes",
    "short/1.jpg": "incomplete body",
    "reset/1.jpg": "connection failed",
    "garbage/1.jpg": "bad response",
    "headers/1.jpg": "bad response",
    "brotli/1.jpg": "unsupported encoding",
    "empty/1.jpg": "empty",
    "loop/1": "too many redirects",
    "noai/noai": "x-robots-tag",
}


@pytest.mark.parametrize("path", ANSWERS)
def test_every_misbehaviour_has_a_reason(server, path):
    assert fetch(f"{server.url}/{path}") == [ANSWERS[path]]


def test_a_slow_drip_ends_with_the_time_of_the_request(server):
    begin = time.monotonic()
    assert fetch(f"{server.url}/drip/1.jpg", timeout=1.0) == ["timeout"]
    assert time.monotonic() - begin < 10


def test_the_first_bytes_and_not_the_content_type_say_what_an_image_is(server):
    [png] = fetch(f"{server.url}/png/1.jpg")
    assert png.startswith(b"\x89PNG")


def test_a_bad_response_does_not_affect_others_of_the_same_host(server):
    bad = [f"{server.url}/{path}" for path in ANSWERS if path.partition("/")[0] not in ("silent", "endless")]
    good = [f"{server.url}/image/{i}.jpg" for i in range(1, 31)]
    mixed = [address for pair in zip(good, (bad * 2)[: len(good)], strict=True) for address in pair]
    results = dict(zip(mixed, fetch(*mixed, f"{server.url}/long/1.jpg", retries=2)[:-1], strict=True))
    assert [results[address] for address in good] == [jpeg(i) for i in range(1, 31)]


def test_only_temporary_failures_are_retried(server):
    paths = ["flaky/1.jpg", "status/404", "status/503", "html/1.jpg"]
    results = fetch(*(f"{server.url}/{path}" for path in paths), retries=1)
    assert results == [jpeg(1), "http 404", "http 503", "not an image"]
    assert [server.hits[f"/{path}"] for path in paths] == [2, 1, 2, 1]


@pytest.mark.parametrize("wait", ["1", "date"])
def test_retry_after_holds_for_the_whole_host(server, wait):
    addresses = [f"{server.url}/busy/{wait}", f"{server.url}/image/2.jpg"]
    assert fetch(*addresses, retries=1, connections=1) == [IMAGE, jpeg(2)]
    gaps = [b - a for a, b in itertools.pairwise(server.times)]
    assert max(gaps) >= 0.9


def test_a_host_that_asks_for_a_long_pause_is_left_alone(server):
    results = fetch(f"{server.url}/busy/600", f"{server.url}/image/2.jpg", retries=1, per_host=1, max_wait=2.0)
    assert results == ["http 429", "http 429"]
    assert sum(server.hits.values()) <= 2  # robots.txt, and the first address
    assert is_temporary("http 429")


# ---------------------------------------------------------------- addresses

REFUSED = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1",
    "fe80::1%eth0", "nonsense", "fec0::1", "5f00::1", "3fff::1", "2001:db8::1", "4000::1", "6000::1", "8000::1", "100::1",
    "64:ff9b:1::7f00:1", "64:ff9b:1::a9fe:a9fe", "64:ff9b:1:7f00:0:100::", "64:ff9b:1:7f00:0:100:808:808",
    "64:ff9b:1:7f:0:1::", "64:ff9b:1::7f:0:100:0", "64:ff9b:2::808:808", "::ffff:0:7f00:1", "::ffff:0:a9fe:a9fe",
    "::8.8.8.8", "2002:a00:1::", "2001:0:a00:1::f7f7:f7f7",
]  # fmt: skip


def test_private_addresses_are_refused_in_every_spelling():
    policy = AddressPolicy()
    assert [text for text in REFUSED if policy.allows(text)] == []
    assert all(
        map(
            policy.allows,
            [
                "8.8.8.8",
                "93.184.216.34",
                "2606:2800:220:1:248:1893:25c8:1946",
                "::ffff:8.8.8.8",
                "64:ff9b::808:808",
                "64:ff9b:1::808:808",
                "::ffff:0:808:808",
                "2002:808:808::",
                "2001:0:808:808::f7f7:f7f7",
            ],
        )
    )


@pytest.mark.parametrize(
    "text",
    ["::ffff:a9fe:a9fe", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:a9:fe:a9fe::",
     "64:ff9b:1::a9:fea9:fe00:0", "::ffff:0:a9fe:a9fe", "2002:a9fe:a9fe::", "2001:0:a9fe:a9fe::f7f7:f7f7",
     "2001:0:808:808::5601:5601", "::a9fe:a9fe", "64:ff9b:1::a83f:8110", "::ffff:0:6464:64c8"],
)  # fmt: skip
def test_metadata_servers_are_refused_in_every_embedding(text):
    networks = (ipaddress.ip_network("::/0"), ipaddress.ip_network("0.0.0.0/0"))
    assert not AddressPolicy(allow_private=True).allows(text)
    assert not AddressPolicy(networks=networks).allows(text)


def test_metadata_servers_are_refused_even_where_private_hosts_are_allowed():
    policy = AddressPolicy(allow_private=True)
    assert all(map(policy.allows, ["127.0.0.1", "10.0.0.1", "::1", "fd12::1"]))
    assert not any(
        map(policy.allows, ["169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "100.100.100.200"])
    )


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:7f00:1]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0"],
)
def test_no_request_reaches_this_machine(server, host):
    [reason] = fetch(f"http://{host}:{server.server_port}/image/1.jpg", private=False)
    assert reason in ("private address", "bad address", "no such host")
    assert not server.hits


@pytest.mark.parametrize("robots_policy", ["obey", "ignore"])
@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "http://127.0.0.2:{port}/image/1.jpg", "http://[::1]:{port}/image/1.jpg",
     "//10.0.0.1/x.jpg", "http://localhost.localdomain./x", "file:///etc/passwd", "ftp://127.0.0.1/x.jpg"],
)  # fmt: skip
def test_redirects_to_private_addresses_are_refused(server, target, robots_policy):
    address = f"{server.url}/redirect?{target.format(port=server.server_port)}"
    allowed = {"private_networks": ("127.0.0.1/32",), "robots": robots_policy}
    [reason] = fetch(address, private=False, **allowed)
    assert reason in ("private address", "bad address", "no such host", "connection failed")
    assert reason == "private address" or "localdomain" in target or "://" in target[:7]
    assert set(server.hits) <= {"/robots.txt", "/redirect"}
    assert fetch(f"{server.url}/redirect?/image/1.jpg", private=False, **allowed) == [jpeg(1)]


def test_a_name_that_changes_its_address_gains_nothing(server, monkeypatch):
    """DNS rebinding: the connection goes to the address that was checked, since there is no second resolution."""
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1", "127.0.0.1"])
    asked = []

    def resolve(host, port, *_, **__):
        asked.append(host)
        address = next(answers)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    resolver = None

    async def run():
        nonlocal resolver
        resolver = CheckedResolver(AddressPolicy())
        first = await resolver.resolve("rebind.example", server.server_port)
        with pytest.raises(RefusedAddress):
            await resolver.resolve("rebind.example", server.server_port)
        return first

    assert [entry["host"] for entry in asyncio.run(run())] == ["93.184.216.34"]
    [reason] = fetch(f"http://rebind.example:{server.server_port}/image/1.jpg", private=False)
    assert reason == "private address"
    assert not server.hits


@pytest.mark.parametrize(
    ("address", "reason"),
    [("", "bad address"), ("no address", "bad address"), ("http://", "bad address"), ("http://h:99999/", "bad address"),
     ("ftp://h/x.jpg", "bad address"), ("data:image/png;base64,AAAA", "bad address"), ("file:///etc/passwd", "bad address"),
     ("http://bücher.invalid/ü.jpg", "no such host"), ("http://" + "a" * 300 + ".invalid/", None),
     ("http://\u2603\u200b..invalid/", None), ("http://[::1", "bad address"), ("http://a b/", None), ("\0", "bad address")],
)  # fmt: skip
def test_unreachable_addresses(address, reason):
    [found] = fetch(address)
    assert found == reason or (reason is None and found in ("bad address", "no such host", "connection failed"))


def test_names_and_paths_in_any_script(server, monkeypatch):
    real, asked = socket.getaddrinfo, []

    def resolve(host, *rest, **options):
        asked.append(host)
        return real("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    address = f"http://bücher.example:{server.server_port}/image/grün und blau.jpg?größe=1"
    assert fetch(address) == [IMAGE]
    assert set(asked) <= {"xn--bcher-kva.example", b"xn--bcher-kva.example"}
    assert "/image/gr%C3%BCn%20und%20blau.jpg" in server.hits


def test_a_login_is_sent_to_its_host_and_appears_nowhere_else(server, caplog):
    caplog.set_level(0)
    address = server.url.replace("http://", "http://user:hunter2@")
    assert fetch(f"{address}/image/1.jpg") == [jpeg(1)]
    assert server.seen["/image/1.jpg"]["Authorization"].startswith("Basic ")
    [target] = fetch(f"{address}/redirect?{server.url}/image/2.jpg")
    assert target == jpeg(2)
    assert "Authorization" not in server.seen["/image/2.jpg"]
    refused = list(download([f"{address}/status/404", address + ":bad"], DownloadConfig(**FAST), allow_private=True))
    assert "hunter2" not in caplog.text + str(refused)


# ---------------------------------------------------------------- robots


def test_the_user_agent_is_stated(server):
    fetch(f"{server.url}/image/1.jpg", user_agent="atlas/2.1 (+https://example.org/atlas)")
    for path in ("/robots.txt", "/image/1.jpg"):
        assert server.seen[path]["User-Agent"] == "atlas/2.1 (+https://example.org/atlas)"


@pytest.mark.parametrize(
    ("value", "word"),
    [("noai", "noai"), ("NoImageAI", "noimageai"), ("nofollow, noai", "noai"), ("atlas: noai", "noai"), ("none", "none"),
     ("otherbot: noai", ""), ("otherbot: noindex, noai", ""), ("all", ""), ("unavailable_after: 25 Jun 2030", ""),
     ("max-image-preview: none", ""), ("max-video-preview: 0, noai", "noai"), ("max-snippet: -1, noindex", "noindex"),
     ("unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai", "noai"), ("unavailable_after: 2030-06-25 15:00:00, noai", "noai"),
     ("atlas: max-video-preview: 0, noai", "noai"), ("otherbot: max-video-preview: 0, noai", ""), ("Atlas : NoAI", "noai"),
     ("otherbot: unavailable_after: Friday, 25-Jun-30 15:00:00 GMT, noai", ""), ("unavailable_after: noai, noindex", "noindex"),
     ("unavailable_after: Jun 25, 2030 15:00:00 GMT, noai", "noai"), ("max-future-preview: 0, noai", "noai"), ("noindex", "noindex"), ("", ""), (":,:", ""),
     ("360bot: noindex, noai", ""), ("max-image-preview: large, otherbot: noai", ""), ("otherbot: max-image-preview:large, noai", "")],
)  # fmt: skip
def test_x_robots_tag(value, word):
    assert robots.forbidden_by([value], "atlas") == word


def test_robots_txt_is_obeyed_with_wildcards_and_the_longest_rule(server):
    server.robots = (
        200,
        b"User-agent: *\nDisallow: /\n\nUser-agent: atlas\nDisallow: /image/*2.jpg$\nDisallow: /png\nAllow: /png/1\n",
    )
    paths = ["image/1.jpg", "image/2.jpg", "image/2.jpg?x=1", "png/1.jpg", "png/2.jpg"]
    addresses = [f"{server.url}/{path}" for path in paths]
    own = fetch(*addresses, user_agent="atlas/1")
    assert [isinstance(result, bytes) or result for result in own] == [True, "robots.txt", True, True, "robots.txt"]
    assert server.hits["/robots.txt"] == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [((404, b""), jpeg(1)), ((403, b""), jpeg(1)), ((500, b""), "robots.txt unreachable"), ((200, b"\xff\xfe\0nonsense"), jpeg(1)),
     ((200, b"User-agent: *\nCrawl-delay: 9999"), "robots.txt"), ((200, b"x" * (2 << 20)), jpeg(1))],
)  # fmt: skip
def test_robots_txt_in_every_state(server, answer, expected):
    server.robots = answer
    assert fetch(f"{server.url}/image/1.jpg") == [expected]


@pytest.mark.parametrize("size", [0, 1000, 100 << 10])
def test_the_memory_for_robots_txt_is_bounded(size):
    """A few large files or many small ones; the hosts that were asked last are kept."""
    body = (b"User-agent: *\nDisallow: /" + b"x" * size)[: size or None]
    asked, count = Counter(), 100 if size > 10_000 else 6000

    async def get(address):
        asked[address] += 1
        return (200, body) if size else (404, b"")

    async def run():
        rules = robots.RobotsFiles("atlas")
        for i in [*range(count), count - 1, 0]:
            await rules.crawl_delay(f"http://host{i}.size{size}", f"http://host{i}.size{size}/y", get)

    tracemalloc.start()
    try:
        asyncio.run(run())
        assert tracemalloc.get_traced_memory()[0] < 20 * robots.KEPT_BYTES
    finally:
        tracemalloc.stop()
    assert asked[f"http://host{count - 1}.size{size}/robots.txt"] == 1
    assert asked[f"http://host0.size{size}/robots.txt"] == (1 if size == 0 else 2)


def test_robots_txt_and_headers_can_be_ignored(server):
    server.robots = (200, b"User-agent: *\nDisallow: /")
    assert fetch(f"{server.url}/image/1.jpg", robots="headers") == [jpeg(1)]
    assert fetch(f"{server.url}/noai/noai", robots="headers") == ["x-robots-tag"]
    assert fetch(f"{server.url}/noai/noai", robots="ignore") == [IMAGE]
    assert not server.hits["/robots.txt"]


def test_a_crawl_delay_is_kept(server):
    server.robots = (200, b"User-agent: *\nCrawl-delay: 0.3")
    assert all(isinstance(result, bytes) for result in fetch(*(f"{server.url}/image/{i}.jpg" for i in range(1, 5))))
    images = server.times[1:]
    assert min(b - a for a, b in itertools.pairwise(images)) > 0.2


# ---------------------------------------------------------------- many at a time


def test_an_address_that_repeats_is_fetched_once(server):
    one, two = f"{server.url}/image/1.jpg", f"{server.url}/image/2.jpg"
    assert fetch(one, two, one, one, two) == [jpeg(1), jpeg(2), jpeg(1), jpeg(1), jpeg(2)]
    assert server.hits["/image/1.jpg"] == server.hits["/image/2.jpg"] == 1


def test_the_memory_of_files_that_wait_is_bounded(server, monkeypatch):
    """The caller waits while later files arrive: few of them are requested, and few of these are in memory."""
    monkeypatch.setattr(stream, "HELD_BYTES", 4 * len(LARGE))
    addresses = [f"{server.url}/large/{i % 60}.jpg" for i in range(120)]
    options = FAST | {"connections": 8, "per_host": 8, "robots": "ignore"}
    tracemalloc.start()
    try:
        results = download(addresses, DownloadConfig(**options), allow_private=True)
        assert next(results) == LARGE
        time.sleep(2)  # more requests could end in this time
        assert sum(server.hits.values()) < 16
        assert all(result == LARGE for result in results)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(LARGE)
    finally:
        tracemalloc.stop()
    assert sum(server.hits.values()) == 60


def test_few_files_are_open_while_they_wait(server, monkeypatch):
    """The files that arrive during the time-out of the first are on the disk."""
    monkeypatch.setattr(bodies, "MEMORY_BYTES", 0)
    monkeypatch.setattr(stream, "HELD_FILES", 10)
    addresses = [f"{server.url}/silent/1.jpg", *(f"{server.url}/image/{i}.jpg" for i in range(1, 100))]
    results = download(addresses, DownloadConfig(**FAST, connections=4, robots="ignore"), allow_private=True)
    assert next(results).reason == "timeout"
    assert 10 <= sum(server.hits.values()) < 20
    assert list(results) == [jpeg(i) for i in range(1, 100)]


def test_a_full_temporary_folder_is_not_blamed_on_the_server(server, monkeypatch):
    """A limit on the file size of the process simulates a full disk."""
    assert fetch(f"{server.url}/image/1.jpg") == [jpeg(1)]  # creates the files of the limits of hosts
    monkeypatch.setattr(stream, "HELD_BYTES", 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(NotWritten, match=f"{tempfile.gettempdir()}: cannot be written .*TMPDIR"):
            fetch(f"{server.url}/large/1.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


OPEN_FILES = """
import os, resource, sys
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.downloads.stream import download
addresses = [f"{sys.argv[1]}/silent/{i}.jpg" for i in range(60)]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, 1000))
config = DownloadConfig(connections=60, per_host=60, robots="ignore", retries=0, stall_timeout=5.0)
print([result.reason for result in download(addresses, config, allow_private=True)])
"""


def test_a_lack_of_open_files_is_not_blamed_on_the_server(server):
    done = subprocess.run([sys.executable, "-c", OPEN_FILES, server.url], capture_output=True, text=True, timeout=300)
    assert re.search("UserError: .*no open files left .*; lower --download.connections 60, or raise", done.stderr), done


def test_results_come_in_order_and_an_early_end_stops_the_downloads(server):
    addresses = [f"{server.url}/image/{i}.jpg" for i in range(1, 200)]
    results = download(addresses, DownloadConfig(**FAST), allow_private=True)
    assert [next(results) for _ in range(3)] == [jpeg(1), jpeg(2), jpeg(3)]
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < 3


def test_requests_to_one_host_at_a_time(server):
    fetch(*(f"{server.url}/image/{i}.jpg" for i in range(1, 60)), per_host=3)
    assert server.most <= 3


def _in_process(address, count, options, answers):
    answers.put(fetch(*(f"{address}/image/{i}.jpg" for i in range(1, count)), **options))


@pytest.mark.parametrize("options", [{"per_host": 2}, {"per_host": 2, "rate": 20.0}])
def test_limits_hold_for_all_processes(server, options):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=_in_process, args=(server.url, 20, options, answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert answers.get(timeout=120) == [jpeg(i) for i in range(1, 20)]
    for worker in workers:
        worker.join()
    assert server.most <= 2
    if "rate" in options:
        times = sorted(server.times)
        assert len(times) / (times[-1] - times[0]) < 24


def test_the_requests_of_a_killed_process_are_released(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=_hold, args=(str(tmp_path), ready))
    worker.start()
    assert ready.wait(60)

    async def request():
        async with HostLimits(1, None, 1.0, str(tmp_path)).request("host"):
            return True

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(request(), 0.3))
    worker.kill()
    worker.join()
    assert asyncio.run(asyncio.wait_for(request(), 10))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    async def request():
        async with HostLimits(1, None, 1.0, str(tmp_path)).request("host"):
            pass

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(UserError, match=f"{tmp_path}: files cannot be locked .*; set TMPDIR"):
        asyncio.run(asyncio.wait_for(request(), 10))


def test_pauses_and_turns_end_with_a_restart_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BOOT_ID", tmp_path / "boot_id")

    def limited(start):
        limits.BOOT_ID.write_text(start)
        return HostLimits(1, 0.001, 60.0, str(tmp_path))

    async def request(limit, host):
        async with limit.request(host):
            return time.monotonic()

    before = limited("first")
    before.pause("paused", 3000.0)
    asyncio.run(request(before, "slow"))  # the next one may begin in 1000 s
    with pytest.raises(Refused):
        asyncio.run(request(before, "paused"))
    for host in ("paused", "slow"):
        asyncio.run(asyncio.wait_for(request(limited("second"), host), 10))


def _hold(folder, ready):
    async def hold():
        async with HostLimits(1, None, 1.0, folder).request("host"):
            ready.set()
            await asyncio.sleep(600)

    asyncio.run(hold())


@pytest.mark.parametrize(
    "options",
    [{"connections": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"timeout": 0.0}, {"user_agent": ""}, {"user_agent": "a\r\nX: y"},
     {"private_networks": ("home",)}, {"max_bytes": 0}, {"retries": -1}, {"connections": 1 << 20}],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(options):
    with pytest.raises(UserError, match=f"--download.{next(iter(options)).replace('_', '-')}"):
        check_downloads(DownloadConfig(**options))


def test_fetcher_alone(server):
    async def run():
        async with Fetcher(DownloadConfig(**FAST), allow_private=True) as fetcher:
            with await fetcher.fetch(f"{server.url}/image/1.jpg") as file:
                assert file.read() == file.read() == jpeg(1)
            with pytest.raises(Refused):
                await fetcher.fetch(f"{server.url}/status/404")

    asyncio.run(run())
