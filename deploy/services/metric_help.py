"""What each number of `/metrics` is, in a sentence: its HELP line. A number without one cannot be served."""

from __future__ import annotations

from typing import Final

HELP: Final = {
    "ready": "1 while the service can take work, else 0.",
    "leading": "1 while this planner leads the region, else 0.",
    "loop_lag_seconds": "Delay of the event loop behind its own timer at the last probe.",
    "missing_topics": "Topics that the service uses and the broker does not have.",
    "tasks": "Tasks that have not ended, as far as this service takes part in them.",
    "failing_nodes": "Nodes that the planner avoids because attempts keep failing there.",
    "task_delay_seconds": "Time from the admission of a task to its end, by outcome and kind of placement.",
    "prediction_ratio": "Measured delay of a completed task divided by the predicted one, by kind of placement.",
    "decisions": "Decisions that this planner has written.",
    "dead_letters": "Records that could not be read and were copied to the dead-letter topic.",
    "decisions_missed": "Times that decisions were deleted before this node had read them.",
    "lost_inputs": "Input records that were deleted before the planner had read them.",
    "policy_errors": "Tasks that were rejected because a user's policy failed.",
    "input_failures": "Input records that the planner could not handle because of a bug of its own.",
    "wrong_identity": "Records whose sender was not the one that they name.",
    "declared_lost": "Times that the planner declared this node lost.",
    "duplicates_suppressed": "Frames that came again and were dropped.",
    "fenced_frames": "Frames of attempts that are over, dropped.",
    "gaps": "Frames that began after a sample's first byte, so that the sample was asked for again.",
    "stalled_attempts": "Attempts that stopped moving and were asked for again.",
    "strangers": "Frames of tasks that are not placed here, dropped.",
    "link1_bytes": "Bytes that were sent over link 1.",
    "link2_bytes": "Bytes that were sent over link 2.",
    "device_busy_seconds": "Time that the device has computed.",
    "link1_busy_seconds": "Time that link 1 has carried data.",
    "edge_busy_seconds": "Time that the edge has computed.",
    "link2_busy_seconds": "Time that link 2 has carried data.",
    "cloud_busy_seconds": "Time that the cloud has computed.",
    "result_busy_seconds": "Time that results have been on their way to the device.",
}
