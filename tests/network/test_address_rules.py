"""Which URLs of a tenant may be fetched: every spelling of a private address is refused, the pin holds."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from daemon.network.address_rules import AddressRefused, AddressRules, AddressUnknown, own_hosts, redact, rules_from
from daemon.network.pinned_client import guarded_client
from daemon.network.public_addresses import is_public
from daemon.settings import Settings
from tests.doubles.certificate import certificate
from tests.doubles.loopback import Exchange, LoopbackServer

PUBLIC = "93.184.216.34"


class Dns:
    """A resolver that answers as the test says, in turn; the last answer stands."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


PRIVATE_FORMS = [
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1./",
    "https://127.000.000.001/",
    "https://127。0。0。1/",
    "https://①②⑦.0.0.1/",
    "https://0/",
    "https://0.0.0.0/",
    "https://10.0.0.8/",
    "https://172.16.5.5/",
    "https://192.168.1.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://169.254.170.2/v2/credentials",
    "https://100.64.0.1/",
    "https://100.100.100.200/latest/meta-data/",
    "https://168.63.129.16/",
    "https://192.0.0.192/",
    "https://198.18.0.1/",
    "https://192.0.2.1/",
    "https://224.0.0.1/",
    "https://240.0.0.1/",
    "https://255.255.255.255/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[0:0:0:0:0:ffff:7f00:0001]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[64:ff9b:1::1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fc00::1]/",
    "https://[fd00:ec2::254]/latest/meta-data/",
    "https://[fec0::1]/",
    "https://[ff02::1]/",
    "https://[2001:db8::1]/",
]

REFUSED_NAMES = [
    "https://localhost/",
    "https://LOCALHOST./",
    "https://db.localhost/",
    "https://metadata/",
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://printer.local/",
    "https://nas.lan/",
    "https://supabase_db/",
    "https://kong:8000/",
]

REFUSED_URLS = [
    "http://example.com/data.jsonl",
    "ftp://example.com/data.jsonl",
    "file:///etc/passwd",
    "gopher://example.com/",
    "data:text/plain,hello",
    "//example.com/x",
    "example.com/x",
    "",
    "https://",
    "https:///etc/passwd",
    "https://user:secret@example.com/",
    "https://example.com@127.0.0.1/",
    "https://exa mple.com/",
    "https://example.com/a b",
    "https://example.com\\@127.0.0.1/",
    "https://example.com/\r\nHost: other",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://1.2.3.256/",
    "https://1.2.3/",
    "https://-.example.com/",
    "https://[::1/",
    "https://%31%32%37.0.0.1/",
]


@pytest.mark.parametrize("url", PRIVATE_FORMS + REFUSED_NAMES + REFUSED_URLS)
async def test_a_url_that_is_not_https_to_a_public_place_is_refused(url: str) -> None:
    # A resolver that says "public" to everything: what is refused here is refused without asking DNS.
    with pytest.raises(AddressRefused):
        await AddressRules(resolve=Dns([PUBLIC])).check(url)


@pytest.mark.parametrize("url", PRIVATE_FORMS)
async def test_no_spelling_becomes_a_request_when_dns_is_asked_too(url: str) -> None:
    with pytest.raises((AddressRefused, AddressUnknown)):
        await AddressRules().check(url)


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["::1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        [PUBLIC, "192.168.0.1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
    ],
)
async def test_a_public_name_with_any_private_address_is_refused(answer: list[str]) -> None:
    with pytest.raises(AddressRefused, match="not a public address"):
        await AddressRules(resolve=Dns(answer)).check("https://files.example.com/data.jsonl?token=secret")


async def test_a_public_address_passes_and_is_pinned() -> None:
    target = await AddressRules(resolve=Dns([PUBLIC])).check("https://Files.Example.com:8443/data.jsonl?token=t#part")
    assert (target.host, target.port, str(target.address)) == ("files.example.com", 8443, PUBLIC)
    async with guarded_client(httpx.Timeout(1.0)) as client:
        request = target.request(client, "GET", headers={"Accept": "*/*"})
    assert str(request.url) == f"https://{PUBLIC}:8443/data.jsonl?token=t"
    assert request.headers["host"] == "files.example.com:8443"
    assert request.extensions["sni_hostname"] == "files.example.com"


async def test_an_ipv6_address_is_pinned_too() -> None:
    target = await AddressRules(resolve=Dns(["2606:2800:220:1::1"])).check("https://six.example.com/x")
    async with guarded_client(httpx.Timeout(1.0)) as client:
        request = target.request(client, "GET")
    assert str(request.url) == "https://[2606:2800:220:1::1]/x"


async def test_a_name_that_cannot_be_resolved_may_be_found_later() -> None:
    async def fails(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    with pytest.raises(AddressUnknown):
        await AddressRules(resolve=fails).check("https://nowhere.example.com/")
    with pytest.raises(AddressUnknown):
        await AddressRules(resolve=Dns([])).check("https://nowhere.example.com/")


@pytest.mark.parametrize(
    ("allowed", "url", "passes"),
    [
        ("127.0.0.1:9000", "http://127.0.0.1:9000/x", True),
        ("127.0.0.1:9000", "http://127.0.0.1:9001/x", False),
        ("127.0.0.1", "http://127.0.0.1:9001/x", True),
        ("minio", "http://minio:9000/x", True),
        ("MinIO:9000", "http://minio:9000/x", True),
        ("minio", "http://minio.example.com/x", False),
        ("example.com", "http://sub.example.com/x", False),
        ("[::1]:9000", "http://[::1]:9000/x", True),
        ("::1", "http://[::1]:9000/x", True),
        ("files.internal", "https://files.internal/x", True),
        ("files.internal:443", "https://files.internal/x", True),
        ("files.internal:443", "http://files.internal/x", False),
        ("127.0.0.1", "http://2130706433/x", False),
        ("minio", "http://user:password@minio/x", False),
    ],
)
async def test_an_exception_is_exact(allowed: str, url: str, passes: bool) -> None:
    rules = AddressRules([allowed], resolve=Dns(["10.0.0.9"]))
    if passes:
        await rules.check(url)
    else:
        with pytest.raises(AddressRefused):
            await rules.check(url)


async def test_the_projects_own_host_is_an_exception_with_its_port() -> None:
    settings = Settings(
        database_url="postgresql://x", supabase_url="http://127.0.0.1:54321", supabase_service_role_key="k"
    )
    rules = rules_from(settings)
    await rules.check("http://127.0.0.1:54321/storage/v1/object/sign/a/b?token=t")
    with pytest.raises(AddressRefused):
        await rules.check("http://127.0.0.1:5432/")
    hosted = settings.model_copy(update={"supabase_url": "https://abcdef.supabase.co"})
    assert own_hosts(hosted) == ("abcdef.supabase.co:443", "abcdef.functions.supabase.co:443")


@pytest.mark.parametrize("text", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"])
def test_public_addresses_are_public_in_every_form(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


def test_a_url_is_shown_without_its_secrets() -> None:
    assert redact("https://u:p@h.example.com:8/a/b?token=secret#x") == "https://h.example.com:8/a/b"
    assert "secret" not in redact("https://[broken/?token=secret")


async def test_the_connection_goes_to_the_checked_address_under_the_checked_name(tmp_path: Path) -> None:
    """DNS changes its mind after the check; nobody asks it again, and the certificate is judged by the name."""
    seen: list[str] = []

    async def handle(exchange: Exchange) -> None:
        seen.append(exchange.headers["host"])
        await exchange.answer(200, b"here")

    server_tls, client_tls = certificate(tmp_path, "files.example.com")
    async with LoopbackServer(handle, tls=server_tls) as server:
        dns = Dns(["127.0.0.1"], ["10.255.255.1"])
        rules = AddressRules([f"files.example.com:{server.port}"], resolve=dns)
        target = await rules.check(f"https://files.example.com:{server.port}/x")
        async with guarded_client(httpx.Timeout(5.0), client_tls) as client:
            for _ in range(2):
                response = await client.send(target.request(client, "GET"))
                assert response.text == "here"
    assert dns.asked == ["files.example.com"]
    assert seen == [f"files.example.com:{server.port}"] * 2


async def test_a_server_at_the_address_that_cannot_prove_the_name_is_not_spoken_to(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handle(exchange: Exchange) -> None:
        asked.append(exchange.path)
        await exchange.answer(200)

    server_tls, client_tls = certificate(tmp_path, "somebody-else.example.com")
    async with LoopbackServer(handle, tls=server_tls) as server:
        rules = AddressRules([f"files.example.com:{server.port}"], resolve=Dns(["127.0.0.1"]))
        target = await rules.check(f"https://files.example.com:{server.port}/x")
        async with guarded_client(httpx.Timeout(5.0), client_tls) as client:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.send(target.request(client, "GET"))
    assert asked == []


async def test_no_cookie_travels_from_one_tenants_host_to_another() -> None:
    cookies: list[str | None] = []

    async def handle(exchange: Exchange) -> None:
        cookies.append(exchange.headers.get("cookie"))
        await exchange.answer(200, b"", {"Set-Cookie": "session=secret; Path=/"})

    async with LoopbackServer(handle) as server, guarded_client(httpx.Timeout(5.0)) as client:
        rules = AddressRules(["a.example.com", "b.example.com"], resolve=Dns(["127.0.0.1"]))
        for host in ("a.example.com", "b.example.com", "a.example.com"):
            target = await rules.check(f"http://{host}:{server.port}/")
            await client.send(target.request(client, "GET"))
    assert cookies == [None, None, None]
