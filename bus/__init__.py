"""The bus room: topics, messages, frames, and the port through which everything flows.

Everyone may import it; it imports nothing of ours. `topics` is the one table of the flow, `values` and `messages` are what
control topics carry (JSON), `frames` what data topics carry (msgpack), `port` the interface of a bus, `memory` and `kafka`
its two implementations, `decisions` the rule by which decisions are read, `errors` the one root of our errors.
"""
