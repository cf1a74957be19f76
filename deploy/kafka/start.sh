#!/bin/sh
# Starts the broker in a container: the shared settings, then the addresses from the environment, then Java.
# Needs a writable /tmp and /var/lib/kafka, nothing else.
#   KAFKA_INTERNAL   host:port for other containers                  (default broker:29092)
#   KAFKA_EXTERNAL   host:port that clients on the host are sent to  (default 127.0.0.1:9092; it listens on 9092 here)
#   KAFKA_HEAP       e.g. 512m
# For a node of a cluster, with the same cluster id and voters on all nodes:
#   KAFKA_NODE_ID, KAFKA_CLUSTER_ID, KAFKA_VOTERS (1@host:29093,2@host:29093,...), KAFKA_COPIES (of every record)
set -eu
internal=${KAFKA_INTERNAL:-broker:29092}
data=/var/lib/kafka/data
settings=/tmp/server.properties
controller=127.0.0.1  # a single node has no other controllers
[ -z "${KAFKA_VOTERS:-}" ] || controller=
cat /opt/kafka/server.properties - > "$settings" <<END

# Added by start.sh
node.id=${KAFKA_NODE_ID:-1}
listeners=INTERNAL://:${internal##*:},EXTERNAL://:9092,CONTROLLER://${controller}:29093
advertised.listeners=INTERNAL://$internal,EXTERNAL://${KAFKA_EXTERNAL:-127.0.0.1:9092}
listener.security.protocol.map=INTERNAL:PLAINTEXT,EXTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
controller.quorum.voters=${KAFKA_VOTERS:-1@127.0.0.1:29093}
log.dirs=$data
# Containers of one machine start together: with two seconds, a broker that lacks CPU time would never rejoin. The interval is
# also the time that a heartbeat may take: with half a second, heartbeats of live brokers fail while a dead one is replaced.
broker.session.timeout.ms=6000
broker.heartbeat.interval.ms=2000
END
if [ "${KAFKA_COPIES:-1}" -gt 1 ]; then
    cat >> "$settings" <<END
default.replication.factor=$KAFKA_COPIES
min.insync.replicas=$((KAFKA_COPIES - 1))
offsets.topic.replication.factor=$KAFKA_COPIES
transaction.state.log.replication.factor=$KAFKA_COPIES
transaction.state.log.min.isr=$((KAFKA_COPIES - 1))
share.coordinator.state.topic.replication.factor=$KAFKA_COPIES
share.coordinator.state.topic.min.isr=$((KAFKA_COPIES - 1))
END
fi
if [ ! -e "$data/meta.properties" ]; then
    rm -rf "$data"  # left by an interrupted format
    # 16 random bytes in base64url; the first character is set, because an id must not begin with "-".
    id=${KAFKA_CLUSTER_ID:-A$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | cut -c 2-22)}
    java -Xmx128m -cp '/opt/kafka/jars/*' kafka.tools.StorageTool format -t "$id" -c "$settings"
fi
archive=/opt/kafka/classes.jsa  # created by archive.sh
share=
[ ! -e "$archive" ] || share=-XX:SharedArchiveFile=$archive
# shellcheck disable=SC2086  # no argument if there is no archive
exec java $share "-Xmx${KAFKA_HEAP:-512m}" -XX:+ExitOnOutOfMemoryError -Dorg.slf4j.simpleLogger.showDateTime=true \
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX" \
    -cp '/opt/kafka/jars/*' kafka.Kafka "$settings"
