"""Reads DeePar's decisions and one frame of results, with nothing but msgpack and a Kafka client.

    python docs/examples/watch.py localhost:9092

It reads what stands on the topics and ends. Every step is what a tool in another language would do: the reading rule of
docs/interface.md, then the layout of a frame.
"""

import asyncio
import json
import math
import sys

import msgpack
from aiokafka import AIOKafkaConsumer

ITEM_BYTES = {"float32": 4, "int8": 1, "uint8": 1, "float16": 2, "int32": 4, "int64": 8, "float64": 8}


async def read_all(bootstrap, topic):
    """Every record of a topic, partition by partition, up to where it ends now."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, group_id=None, enable_auto_commit=False,
        auto_offset_reset="earliest", isolation_level="read_committed",
    )  # fmt: skip
    await consumer.start()
    try:
        partitions = sorted(consumer.assignment())  # without a group: all of them
        ends = await consumer.end_offsets(partitions)
        # a position may pass offsets that hold no record, so positions are compared, not the last record's offset
        while [p for p in partitions if await consumer.position(p) < ends[p]]:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()


class Region:
    """The reading rule: of all that stands in a partition of deepar.decisions, what counts."""

    def __init__(self):
        self.epoch, self.nonce, self.seq = 0, "", 0
        self.parts = []  # changes of a decision that takes several records, as far as they have come

    def counts(self, message):
        if message["type"] == "epoch_opened":
            if message["epoch"] <= self.epoch:
                return False  # lost the race
            self.epoch, self.nonce, self.parts = message["epoch"], message["nonce"], []
            return True
        if (message["epoch"], message["nonce"]) != (self.epoch, self.nonce):
            return False  # of a planner that no longer leads
        if message["type"] in ("decision_part", "decision"):
            if message["seq"] != self.seq + 1:
                return False
            if message["type"] == "decision_part":
                if message["part"] == len(self.parts) + 1:
                    self.parts.append(message["changes"])
                return False  # it counts with its decision
            if message.get("parts", 0) != len(self.parts):
                return False
            message["changes"] = [change for part in self.parts for change in part] + message["changes"]
            self.seq, self.parts = message["seq"], []
        return True


def decode_frame(value):
    """The head of a frame, and a tensor description and bytes for every piece. Limits as in docs/interface.md."""
    if len(value) > 1_040_000:
        raise ValueError("too large")
    frame = msgpack.unpackb(
        value, raw=False, strict_map_key=True, max_array_len=512, max_map_len=64, max_ext_len=0, max_str_len=4096
    )
    if frame["v"] != 1:
        raise ValueError(f"frame version {frame['v']}")
    pieces, begin = [], 0
    for piece in frame["pieces"]:
        # whole samples with the same tensors share one description: take it as one piece each
        for sample in piece.get("samples", [piece.get("sample")]):
            one = {"at": 0, "bytes": piece["size"]} | piece | {"sample": sample}
            data = frame["data"][begin : begin + one["bytes"]]
            begin += one["bytes"]
            pieces.append((one, data))
    return frame, pieces


async def main(bootstrap):
    regions = {}
    async for record in read_all(bootstrap, "deepar.decisions"):
        message = json.loads(record.value)
        if message["v"] != 1 or not regions.setdefault(record.partition, Region()).counts(message):
            continue
        for change in message.get("changes", ()):
            if change["type"] == "placement":
                place = change["placement"]
                print(
                    f"{change['task_id']}: {place['kind']} via {place.get('edge')}, {change['delay_s']:.3f} s expected"
                )
            elif change["type"] == "ended":
                print(f"{change['task_id']}: {change['state']} {change.get('cause', '')}")
    async for record in read_all(bootstrap, "deepar.results"):
        frame, pieces = decode_frame(record.value)
        for piece, data in pieces:
            for tensor in piece.get("tensors", ()):
                size = math.prod(tensor["shape"]) * ITEM_BYTES[tensor["dtype"]]
                print(
                    f"frame of {frame['task']} from {frame['from']}: sample {piece['sample']}, "
                    f"{tensor['dtype']} {tensor['shape']}, {size} bytes, first {data[:4].hex()}"
                )
        if pieces:
            break


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "localhost:9092"))
