"""Unique keys made by River's own code (v0.43): encoded args, options, what is hashed, its sha256, and the mask."""

import re
from datetime import timedelta
from typing import Any, Final

from sqla_river.states import JobState
from sqla_river.unique import Unique

VECTORS: Final[list[dict[str, Any]]] = [
    {
        "bitmask": 245,
        "encoded_args": '{"a":"x","b":1}',
        "key_hex": "cfadcfc744cb9cfc9fdd2c9f4319743019ae25822f1489d44f2a7dddacf13feb",
        "kind": "my_kind",
        "name": "simple_by_args",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": '&kind=my_kind&args={"a":"x","b":1}',
    },
    {
        "bitmask": 245,
        "encoded_args": '{"\\u003ca\\u003e":2,"A":1,"z":"ü","é":1}',
        "key_hex": "1e2ecd630a7a27384e4b9cfb4d8b6bb01fe872ced58aa6fe00697727eff7b2ed",
        "kind": "my_kind",
        "name": "unicode_key",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": '&kind=my_kind&args={"<a>":2,"A":1,"z":"ü","é":1}',
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":[],"m":{"a":{},"b":[1,null,true]}}',
        "key_hex": "6b0542a7c5a6fa63f84e179b5f9f2f6ec717e916522736d08936a5b321339dcb",
        "kind": "my_kind",
        "name": "nested_maps",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": '&kind=my_kind&args={"a":[],"m":{"a":{},"b":[1,null,true]}}',
    },
    {
        "bitmask": 245,
        "encoded_args": "{}",
        "key_hex": "2d5b535006876b3457a4b43fe80e535a59da43d4ec6e27269e9f8860de50ec6e",
        "kind": "my_kind",
        "name": "empty_args",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=my_kind&args={}",
    },
    {
        "bitmask": 245,
        "encoded_args": '{"customer":{"id":"c1","name":"n"},"n":3}',
        "key_hex": "0bb4e664f2a6f0f22a0ef3950bc2fb350ff96c489713490043f6ee6a0da9e581",
        "kind": "nested",
        "name": "nested_tagged",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": '&kind=nested&args={"customer":{"id":"c1"}}',
    },
    {
        "bitmask": 245,
        "encoded_args": '{"b":1}',
        "key_hex": "ce7f5e0db30d20a3f0df012f7d507c97a475b4db2b4df47541c67b3a59b5b0dd",
        "kind": "omit",
        "name": "tagged_all_omitted",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=omit&args=",
    },
    {
        "bitmask": 245,
        "encoded_args": '{"i":{"z":1,"a":2},"b":"AQL/","t":"2026-03-04T05:06:07.891Z","d":1000000000,"f32":0.1,"big":9007199254740993}',
        "key_hex": "400b46548ebb075ea94dbce1cc403ab45e6afc32ffae8f8883868f08dda81b7e",
        "kind": "st",
        "name": "struct_types",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": '&kind=st&args={"b":"AQL/","big":9007199254740993,"d":1000000000,"f32":0.1,"i":{"z":1,"a":2},"t":"2026-03-04T05:06:07.891Z"}',
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":1}',
        "key_hex": "d6d5d0ef58aaf5471fd08ecc9bd69918bf694d00b66cf94618b73e580740a7ea",
        "kind": "my_kind",
        "name": "period_15m",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:false ByPeriod:15m0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=my_kind&period=2026-03-04T05:00:00Z",
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":1}',
        "key_hex": "282a53ff846bea6b723d3be6c1dc89fdefa290c917a78d3120108959b6d7e3b0",
        "kind": "my_kind",
        "name": "period_24h",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:false ByPeriod:24h0m0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=my_kind&period=2026-03-04T00:00:00Z",
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":1}',
        "key_hex": "1503df742f936b295917b4f670d0cbcd5d7a5b588bdc51f306c3e280c6808cb8",
        "kind": "my_kind",
        "name": "period_7d",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:false ByPeriod:168h0m0s ByQueue:false ByState:[] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=my_kind&period=2026-03-02T00:00:00Z",
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":1}',
        "key_hex": "cadb6103b1b3cfbc1bfa7197325e8e91c28681d44c80d4b0fd6eee0f0cc6759d",
        "kind": "my_kind",
        "name": "args_period_queue",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:1h0m0s ByQueue:true ByState:[] ExcludeKind:false}",
        "queue": "q1",
        "prehash": '&kind=my_kind&args={"a":1}&period=2026-03-04T05:00:00Z&queue=q1',
    },
    {
        "bitmask": 245,
        "encoded_args": '{"a":1}',
        "key_hex": "f74ba0f36e8e10af1715edd272b3226b76d2af2794c4e63d843ba5a32f873b53",
        "kind": "my_kind",
        "name": "exclude_kind",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:true ByPeriod:0s ByQueue:false ByState:[] ExcludeKind:true}",
        "queue": "default",
        "prehash": '&args={"a":1}',
    },
    {
        "bitmask": 209,
        "encoded_args": '{"a":1}',
        "key_hex": "78f9c3530cd6de7f4dc6b9659f365eb987e7d49ae43a3ab7d945323097390657",
        "kind": "my_kind",
        "name": "by_state_only",
        "now": "2026-03-04T05:06:07.891Z",
        "opts": "{ByArgs:false ByPeriod:0s ByQueue:false ByState:[available pending running scheduled] ExcludeKind:false}",
        "queue": "default",
        "prehash": "&kind=my_kind",
    },
]

MARKED: Final = {"nested_tagged": ["customer.id"], "tagged_all_omitted": ["a"]}
"""The fields that the vector's args type marks as unique."""


def unique_of(vector: dict[str, Any]) -> tuple[Unique, list[str]]:
    """The options of *vector*, which are printed as Go prints them, and the marked fields."""
    said = dict(re.findall(r"(\w+):(\[[^\]]*\]|\S+?)(?=[ }])", vector["opts"]))
    hours, minutes, seconds = (
        int(part or 0) for part in re.findall(r"^(?:(\d+)h)?(?:(\d+)m)?(\d+)s$", said["ByPeriod"])[0]
    )
    period = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    states = [JobState(state) for state in said["ByState"][1:-1].split()]
    unique = Unique(
        by_args=said["ByArgs"] == "true",
        by_queue=said["ByQueue"] == "true",
        by_period=period or None,
        by_state=states or None,
        exclude_kind=said["ExcludeKind"] == "true",
    )
    return unique, MARKED.get(vector["name"], [])
