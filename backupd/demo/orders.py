"""PostgreSQL in the demo: what is written, what is changed, how all of it is measured.

Everything goes through psql, as any administrator would do it, not through what the backup uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from backupd.demo.picture import Picture, digest

Psql: TypeAlias = Callable[[str, str], str]
"""(database, SQL) -> what psql prints, unaligned, without headings; raises when a statement fails."""

DATABASE = "productdemo"
USER = "productdemo"
DATABASES = (DATABASE, "reports")

FILL = """
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE ROLE clerk LOGIN PASSWORD 'demo';
CREATE ROLE auditors NOLOGIN;
GRANT auditors TO clerk;
CREATE TABLE customers (id serial PRIMARY KEY, name text NOT NULL, email text UNIQUE, details jsonb);
INSERT INTO customers (name, email, details)
  SELECT 'Customer ' || i, i || '@example.org', jsonb_build_object('tier', i % 5, 'tags', ARRAY[i % 7, i % 11])
  FROM generate_series(1, 3000) i;
CREATE TABLE orders (
  id bigserial PRIMARY KEY, customer int NOT NULL REFERENCES customers, placed timestamptz NOT NULL,
  total numeric(10, 2) CHECK (total >= 0), note text, receipt bytea);
INSERT INTO orders (customer, placed, total, note, receipt)
  SELECT 1 + i % 3000, timestamptz '2026-01-01 00:00+00' + i * interval '97 seconds', (i * 7919 % 100000) / 100.0,
    repeat(md5(i::text), 1 + i % 4), decode(md5((i * 31)::text), 'hex')
  FROM generate_series(1, 30000) i;
CREATE INDEX orders_placed ON orders (placed);
CREATE INDEX customers_name ON customers USING gin (name gin_trgm_ops);
CREATE VIEW turnover AS SELECT customer, sum(total) AS total FROM orders GROUP BY customer;
GRANT SELECT ON orders TO auditors;
SELECT lo_from_bytea(4711, decode(repeat('c0ffee', 40000), 'hex'));
"""

REPORTS = """
CREATE TABLE monthly (month date PRIMARY KEY, total numeric);
INSERT INTO monthly SELECT date '2020-01-01' + i * interval '1 month', i * 1000 FROM generate_series(0, 70) i;
"""

CHANGE = """
UPDATE orders SET total = total + 1, note = 'changed' WHERE id % 5 = 0;
DELETE FROM orders WHERE id % 7 = 0;
DROP VIEW turnover;
ALTER TABLE customers ADD COLUMN phone text;
INSERT INTO customers (name, email) SELECT 'Late ' || i, i || '@late.example' FROM generate_series(1, 500) i;
SELECT lo_put(4711, 100, '\\xdeadbeef');
ALTER ROLE clerk NOLOGIN;
CREATE TABLE mistakes AS SELECT now() AS made;
"""

_MARK = "=== "
_TABLES = """
SELECT format('%I.%I', schemaname, tablename) FROM pg_tables
WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1;
"""
_ROWS = """
SELECT count(*), encode(sha256(convert_to(coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), ''), 'UTF8')), 'hex')
FROM {table} t
"""
_DEFINITIONS = {
    "columns": "SELECT table_name, column_name, data_type, column_default, is_nullable "
    "FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, ordinal_position",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1",
    "constraints": "SELECT conrelid::regclass, conname, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
    "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public' ORDER BY 1",
    "sequences": "SELECT sequencename, last_value FROM pg_sequences ORDER BY 1",
    "extensions": "SELECT extname, extversion FROM pg_extension ORDER BY 1",
    "grants": "SELECT relname, relacl FROM pg_class WHERE relacl IS NOT NULL "
    "AND relnamespace = 'public'::regnamespace ORDER BY 1",
    "large objects": "SELECT oid, encode(sha256(lo_get(oid)), 'hex') FROM pg_largeobject_metadata ORDER BY 1",
}
_ROLES = """
SELECT rolname, rolsuper, rolcanlogin, rolinherit, (SELECT array_agg(g.rolname ORDER BY 1) FROM pg_auth_members m
  JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid) FROM pg_roles r WHERE rolname !~ '^pg_' ORDER BY 1;
"""


def fill(psql: Psql) -> None:
    """Tables, an index of an extension, a view, roles, a large object, a second database."""
    psql(DATABASE, FILL)
    psql(DATABASE, "CREATE DATABASE reports")
    psql("reports", REPORTS)


def change(psql: Psql) -> None:
    """What a day does to a database, and one mistake."""
    psql(DATABASE, CHANGE)
    psql("reports", "DELETE FROM monthly WHERE total < 30000")


def look(psql: Psql) -> Picture:
    """Every row of every table, every definition, the roles."""
    things, rows, tables = {"roles": digest(psql(DATABASE, _ROLES))}, 0, 0
    for database in DATABASES:
        names = psql(database, _TABLES).split()
        questions = {table: _ROWS.format(table=table) for table in names} | _DEFINITIONS
        # one psql for all of them, with a line of its own before each answer
        script = "".join(f"\\echo {_MARK}{name}\n{query};\n" for name, query in questions.items())
        for answer in psql(database, script).split(_MARK)[1:]:
            name, _, said = answer.partition("\n")
            if name in names:
                count, _, content = said.strip().partition("|")
                things[f"{database}: {name}"] = f"{count} rows, {content}"
                rows, tables = rows + int(count), tables + 1
            else:
                things[f"{database}: {name}"] = digest(said)
    return Picture(f"{rows:,} rows in {tables} tables of {len(DATABASES)} databases", things)
