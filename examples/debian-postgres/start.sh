#!/bin/sh
# Makes the cluster where there is none yet, and runs it. The volume is mounted at /data.
set -eu
export PATH=/usr/lib/postgresql/15/bin:$PATH
if [ "$(id -u)" = 0 ]; then
    mkdir -p /data/postgres /run/postgresql
    chown postgres:postgres /data/postgres /run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups --reset-env "$0" "$@"
fi
export PGDATA=/data/postgres/15
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    # Made beside and renamed: one that was cut short is not taken for a whole one.
    rm -rf "$PGDATA.new"
    /usr/lib/postgresql/15/bin/initdb --pgdata="$PGDATA.new" --auth-local=peer --auth-host=trust \
        --locale=C.UTF-8 --data-checksums >/dev/null
    # Whoever reaches the port is of this organization.
    echo "host all all fdaa::/16 trust" >>"$PGDATA.new/pg_hba.conf"
    sync
    mv "$PGDATA.new" "$PGDATA"
fi
exec /usr/lib/postgresql/15/bin/postgres -D "$PGDATA" -c listen_addresses='*' -c shared_buffers=64MB "$@"
