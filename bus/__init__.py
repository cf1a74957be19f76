"""The bus room: topics, messages, frames, and the `Bus` port through which everything flows.

Every room may import it; it imports nothing of ours. Start with `topics` (the table of topics), `messages` (control
messages, JSON), `frames` (activations, msgpack), `port` (the interface of a bus) and `decisions` (which decision records
count). Wings: `memory` and `kafka` implement the port, `identity` proves who sent a record, `text` formats units and JSON,
`routes` computes shares of several routes.
"""
