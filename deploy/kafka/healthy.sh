#!/bin/bash
# Exit 0 if the broker answers `Metadata` version 1 with at least one broker, as deploy/kafka_local/handshake.py checks. A Java
# tool would use two cores for a second at each check.
exec 3<>/dev/tcp/127.0.0.1/9092 || exit 1
# length 20, key 3 (Metadata), version 1, correlation 3, client "deepar" without null, no topics
printf '\0\0\0\24\0\3\0\1\0\0\0\3\0\6deepar\0\0\0\0' >&3
# length, correlation, count of brokers
read -r -d '' _ _ _ _ c1 c2 c3 c4 n1 n2 n3 n4 < <(timeout 3 head -c 12 <&3 | od -An -v -tu1 -w12; printf '\0')
[ "$c1 $c2 $c3 $c4" = "0 0 0 3" ] && [ "$((n1 + n2 + n3 + n4))" -gt 0 ]
