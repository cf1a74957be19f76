#!/bin/sh
# Starts the broker in a container: the shared settings, then the addresses from the environment, then Java.
# Needs a writable /tmp and /var/lib/kafka, nothing else.
#   KAFKA_INTERNAL   host:port that other containers are sent to     (default broker:29092)
#   KAFKA_EXTERNAL   host:port that clients on the host are sent to  (default 127.0.0.1:9092; it listens on 9092 here)
#   KAFKA_HEAP       e.g. 512m
set -eu
internal=${KAFKA_INTERNAL:-broker:29092}
data=/var/lib/kafka/data
settings=/tmp/server.properties
cat /opt/kafka/server.properties - > "$settings" <<END

# Added by start.sh
listeners=INTERNAL://:${internal##*:},EXTERNAL://:9092,CONTROLLER://127.0.0.1:29093
advertised.listeners=INTERNAL://$internal,EXTERNAL://${KAFKA_EXTERNAL:-127.0.0.1:9092}
listener.security.protocol.map=INTERNAL:PLAINTEXT,EXTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
controller.quorum.voters=1@127.0.0.1:29093
log.dirs=$data
END
if [ ! -e "$data/meta.properties" ]; then
    rm -rf "$data"  # a format that was interrupted
    # 16 random bytes in base64url; the first character is set, because an id must not begin with "-".
    id=A$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | cut -c 2-22)
    java -Xmx128m -cp '/opt/kafka/jars/*' kafka.tools.StorageTool format -t "$id" -c "$settings"
fi
exec java "-Xmx${KAFKA_HEAP:-512m}" -XX:+ExitOnOutOfMemoryError -Dorg.slf4j.simpleLogger.showDateTime=true \
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX" \
    -cp '/opt/kafka/jars/*' kafka.Kafka "$settings"
