#!/bin/sh
# PostgreSQL's first start: the owner of the schema, and the application role that owns nothing.
set -eu
psql -v ON_ERROR_STOP=1 -U postgres -d yuanzhen -v owner="$OWNER_PASSWORD" -v app="$APP_PASSWORD" <<'SQL'
CREATE ROLE yuanzhen_owner LOGIN PASSWORD :'owner';
CREATE ROLE yuanzhen_app LOGIN NOBYPASSRLS PASSWORD :'app';
ALTER DATABASE yuanzhen OWNER TO yuanzhen_owner;
REVOKE ALL ON DATABASE yuanzhen FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE yuanzhen TO yuanzhen_app;
SQL
