"""Embedded data is left out of texts, and prose in any language stays."""

from __future__ import annotations

import base64
import random
import textwrap

import pytest
from growth import growth_of_time
from junk_text import without_junk

BYTES = random.Random(3).randbytes(3_000)
BASE64 = base64.b64encode(BYTES).decode()
HEX = BYTES.hex()
CODE = "function f(a,b){var c=a[b];return c&&c.d?c.d(b):null}e.exports={f:f,g:[1,2,3]};" * 30


def xxd(data: bytes) -> str:
    rows = [data[start : start + 16] for start in range(0, len(data), 16)]
    return "\n".join(f"{n * 16:08x}: {row.hex(' ', 2)}  {'.' * len(row)}" for n, row in enumerate(rows))


def hexdump(data: bytes) -> str:
    rows = [data[start : start + 16] for start in range(0, len(data), 16)]
    return "\n".join(f"{n * 16:08x}  {row.hex(' ')}  |{'.' * len(row)}|" for n, row in enumerate(rows))


DATA = {
    "image in Markdown": f"![map](data:image/png;base64,{BASE64})",
    "image in a style": f"url('data:image/svg+xml;charset=utf-8;base64,{BASE64}')",
    "one line of base64": BASE64,
    "wrapped base64": "\n".join(textwrap.wrap(BASE64, 76)),
    "certificate": "-----BEGIN CERTIFICATE-----\n"
    + "\n".join(textwrap.wrap(BASE64, 64))
    + "\n-----END CERTIFICATE-----",
    "quoted mail": "\n".join("> " + line for line in textwrap.wrap(BASE64, 72)),
    "url-safe base64": base64.urlsafe_b64encode(BYTES).decode(),
    "one line of hex": HEX,
    "wrapped hex": "\n".join(textwrap.wrap(HEX, 64)),
    "spaced hex": "\n".join(textwrap.wrap(BYTES.hex(" "), 48)),
    "hex with colons": "\n".join(textwrap.wrap(BYTES.hex(":"), 48)),
    "array in C": "\n".join(textwrap.wrap(", ".join(f"0x{b:02x}" for b in BYTES), 72)),
    "xxd": xxd(BYTES),
    "hexdump": hexdump(BYTES + bytes(400)),
    "minified code": CODE,
    "minified style": ".a{color:red;margin:0 auto}.b>.c{padding:1px 2px}" * 40,
    "data in JSON": '{"id":1234,"values":[' + ",".join(map(str, BYTES)) + "]}",
}
PROSE = {
    "English": "The keeper of the lamp walks down to the harbour every evening. " * 60,
    "German": "Donaudampfschifffahrtsgesellschaftskapitäne verhandeln Geschwindigkeitsbegrenzungen. " * 40,
    "Finnish": "Lentokonesuihkuturbiinimoottoriapumekaanikkoaliupseerioppilas kirjoittaa talon kellarissa. " * 30,
    "Chinese": "灯塔守护人每天晚上走到港口" * 200,
    "Thai": "ผู้ดูแลประภาคารอาศัยอยู่ที่ภูเก็ต" * 100,
    "numbers": "\n".join(" ".join(str(1900 + n + m) for m in range(12)) for n in range(30)),
    "table with years": "\n".join(f"{1900 + n}: " + " ".join(str(10 * n + m) for m in range(10)) for n in range(30)),
    "addresses": "\n".join(f"https://example.org/harbour/{n}/lamp-lit-in-1870-by-keeper-{n}.html" for n in range(30)),
    "Markdown table": "\n".join(["| lamp | year |", "|---|---|", *(f"| L{n} | {1900 + n} |" for n in range(40))]),
    "code": "\n".join(f"    def lamp_{n}(self, height: int) -> int:\n        return {n}\n" for n in range(40)),
    "JSON": '[{"title": "The lamp was lit", "text": "The keeper walks down to the harbour."}, ' * 30,
    "one hash": "The file has the SHA-256 " + HEX[:64] + " and the commit " + HEX[64:104] + ".",
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_is_left_out_and_counted(name):
    text, left_out = without_junk(f"The lamp was lit.\n\n{DATA[name]}\n\nThe keeper left.\n")
    assert text.startswith("The lamp was lit.\n")
    assert text.endswith("\nThe keeper left.\n")
    assert len(text) < 200
    (description,) = left_out
    assert int(description.split("(")[1].split()[0].replace(",", "")) > 0.9 * len(DATA[name])


@pytest.mark.parametrize("name", PROSE)
def test_text_that_people_wrote_stays(name):
    assert without_junk(PROSE[name]) == (PROSE[name], ())


@pytest.mark.parametrize(
    "unit", ["a", "data:a/b;base64,", "A" * 900 + " ", "ab ", "7f 45 4c 46 02 01 00 ab\n", "\n", "0x"]
)
def test_time_grows_in_step_with_the_text(unit):
    assert growth_of_time(lambda size: without_junk(unit * size), 2_000) < 10
