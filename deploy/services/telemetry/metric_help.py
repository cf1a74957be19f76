"""HELP lines of `/metrics`. Every metric needs one; serving a metric without it fails."""

from __future__ import annotations

from typing import Final

HELP: Final = {
    "ready": "1 while the service can accept work, else 0.",
    "leading": "1 while this planner leads the region, else 0.",
    "loop_lag_seconds": "Delay of the event loop behind its own timer at the last probe.",
    "missing_topics": "Number of topics that the service needs and the broker lacks.",
    "tasks": "Tasks in progress that this service takes part in.",
    "serving_sessions": "Sessions of clients that are open at the endpoint.",
    "failing_nodes": "Nodes that the planner avoids after repeated failed attempts.",
    "task_delay_seconds": "Time from the admission of a task to its end, by outcome and kind of placement.",
    "prediction_ratio": "Measured delay of a completed task divided by the predicted one, by kind of placement.",
    "prediction_error_median": "Median of |measured / predicted delay - 1| over the last 50 completed tasks.",
    "learned_speed_factor": "How many times slower than its profile a model runs on a node, as the planner has learned.",
    "learned_latency_seconds": "One-way latency of a link, as measured by probes and used in predictions.",
    "decisions": "Decisions that this planner has written.",
    "dead_letters": "Rejected records that were copied to the dead-letter topic.",
    "decisions_missed": "Number of times that decisions were deleted before this node had read them.",
    "lost_inputs": "Input records that were deleted before the planner had read them.",
    "policy_errors": "Tasks rejected because a user-defined policy failed.",
    "learned": "Records that corrected predictions by what a completed task or a node measured.",
    "input_failures": "Input records that the planner skipped because of a bug in the planner.",
    "wrong_identity": "Records rejected because the sender's identity was not proven.",
    "declared_lost": "Number of times that the planner declared this node lost.",
    "probes_dropped": "Probes of a link that this node did not answer: it was answering too many others, or could not send.",
    "duplicates_suppressed": "Duplicate frames that were dropped.",
    "fenced_frames": "Frames of superseded attempts that were dropped.",
    "gaps": "Frames with missing bytes before them; the sample was requested again.",
    "stalled_attempts": "Attempts without progress whose data was requested again.",
    "strangers": "Frames of tasks placed elsewhere that were dropped.",
    "link1_bytes": "Bytes sent over link 1.",
    "link2_bytes": "Bytes sent over link 2.",
    "device_busy_seconds": "Time that the device has computed.",
    "link1_busy_seconds": "Time that link 1 has carried data.",
    "edge_busy_seconds": "Time that the edge has computed.",
    "link2_busy_seconds": "Time that link 2 has carried data.",
    "cloud_busy_seconds": "Time that the cloud has computed.",
    "result_busy_seconds": "Time that results have been in transit to the device.",
}
