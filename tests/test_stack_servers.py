"""The embedded servers themselves: they answer, keep what they were given, and are closed to those without a key."""
import psycopg, redis
def test_a(postgres_server, s3_server, valkey_server):
    print(postgres_server.owner_url, s3_server, valkey_server.url)
    with psycopg.connect(postgres_server.app_url.replace('+psycopg','')) as c: print(c.execute('select current_user').fetchone())
    r=redis.Redis.from_url(valkey_server.url); r.ping(); r.close()
