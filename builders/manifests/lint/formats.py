"""Whether a text is what an API server takes for a name, a key, an address, a schedule.

Source: kubernetes.io/docs/concepts/overview/working-with-objects, and the API reference of each field.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re

_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_SYSCTL = re.compile(r"([a-z0-9]([-_a-z0-9]*[a-z0-9])?[./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?")
_SHARE = re.compile(r"[0-9]+%?")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_ENV_FIELDS = re.compile(
    r"metadata\.(name|namespace|uid|(labels|annotations)\['[^']+'\])"
    r"|spec\.(nodeName|serviceAccountName)|status\.(hostIPs?|podIPs?)"
)
_VOLUME_FIELDS = re.compile(r"metadata\.(name|namespace|uid|labels|annotations|(labels|annotations)\['[^']+'\])")
_RESOURCE_FIELDS = re.compile(r"(limits|requests)\.(cpu|memory|ephemeral-storage|hugepages-\w+)")

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_CRON: tuple[tuple[int, int, list[str]], ...] = ((0, 59, []), (0, 23, []), (1, 31, []), (1, 12, _MONTHS), (0, 6, _DAYS))
_SHORT = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")


def is_label_value(text: object) -> bool:
    return isinstance(text, str) and len(text) <= 63 and _LABEL_VALUE.fullmatch(text) is not None


def is_key(text: str) -> bool:
    """Of a label, an annotation, a resource: a name, after a domain or not."""
    domain, slash, name = text.rpartition("/")
    return (not slash or is_dns_name(domain)) and 0 < len(name) <= 63 and _LABEL_VALUE.fullmatch(name) is not None


def is_dns_label(text: str) -> bool:
    return len(text) <= 63 and _DNS_LABEL.fullmatch(text) is not None


def is_dns_name(text: str) -> bool:
    return len(text) <= 253 and _DNS_NAME.fullmatch(text) is not None


def is_port_name(text: str) -> bool:
    return len(text) <= 15 and _PORT_NAME.fullmatch(text) is not None


def is_domain(text: str) -> bool:
    """A DNS name, also one that begins with `*.`."""
    return not is_ip(text) and is_dns_name(text.removeprefix("*."))


def is_sysctl(text: str) -> bool:
    return len(text) <= 253 and _SYSCTL.fullmatch(text) is not None


def is_variable(text: str) -> bool:
    return text.isascii() and text.isprintable() and "=" not in text and text != ""


def is_data_key(text: str) -> bool:
    return len(text) <= 253 and _DATA_KEY.fullmatch(text) is not None and text not in (".", "..")


def is_share(value: object) -> bool:
    """A number, or a percentage."""
    return _SHARE.fullmatch(str(value)) is not None


def is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """None for what is no CIDR."""
    try:
        return ipaddress.ip_network(text, strict=False) if "/" in text else None
    except ValueError:
        return None


def is_base64(text: str) -> bool:
    try:
        base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def is_field_of_env(text: str) -> bool:
    return _ENV_FIELDS.fullmatch(text) is not None


def is_field_of_volume(text: str) -> bool:
    return _VOLUME_FIELDS.fullmatch(text) is not None


def is_resource_field(text: str) -> bool:
    return _RESOURCE_FIELDS.fullmatch(text) is not None


def is_inside(text: str) -> bool:
    """A relative path that does not climb."""
    return text != "" and not text.startswith("/") and ".." not in text.split("/")


def is_absolute(text: str) -> bool:
    return text.startswith("/")


def is_schedule(text: str) -> bool:
    """As CronJobs take it: five fields, or a word with `@`. https://pkg.go.dev/github.com/robfig/cron/v3"""
    if text.startswith("@"):
        return text in _SHORT or re.fullmatch(r"@every (\d+(\.\d+)?(ns|us|ms|s|m|h))+", text) is not None
    fields = text.split()
    return len(fields) == 5 and all(
        _is_cron_field(part, low, high, words)
        for field, (low, high, words) in zip(fields, _CRON, strict=True)
        for part in field.split(",")
    )


def _is_cron_field(part: str, low: int, high: int, words: list[str]) -> bool:
    """`*`, `*/5`, `3`, `1-5`, `mon-fri/2`."""
    span, slash, step = part.partition("/")
    if slash and (not step.isdigit() or int(step) == 0):
        return False
    if span in ("*", "?"):
        return True
    ends = [low + words.index(end.lower()) if end.lower() in words else end for end in span.split("-")]
    if len(ends) > 2 or not all(isinstance(end, int) or end.isdigit() for end in ends):
        return False
    numbers = [int(end) for end in ends]
    return low <= numbers[0] <= numbers[-1] <= high
