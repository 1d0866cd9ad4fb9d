"""What the catalog says of a schema, to be compared."""

from typing import Any

from sqlalchemy import Connection, text

_QUERIES = {
    "tables": "SELECT relname, relpersistence::text, coalesce(reloptions, '{}') FROM pg_class WHERE relnamespace = {n} "
    "AND relkind IN ('r', 'S')",
    "columns": "SELECT c.relname, a.attnum - (SELECT count(*) FROM pg_attribute d WHERE d.attrelid = c.oid "
    "AND d.attisdropped AND d.attnum < a.attnum), a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, "
    "pg_get_expr(d.adbin, d.adrelid), a.attidentity::text, a.attstorage::text FROM pg_class c "
    "JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum "
    "WHERE c.relnamespace = {n} AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped",
    "constraints": "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated "
    "FROM pg_constraint WHERE connamespace = {n}",
    "indexes": "SELECT i.relname, pg_get_indexdef(i.oid), x.indisvalid FROM pg_index x "
    "JOIN pg_class i ON i.oid = x.indexrelid WHERE i.relnamespace = {n}",
    "functions": "SELECT proname, pg_get_function_arguments(oid), pg_get_function_result(oid), provolatile::text, "
    "prosecdef, proconfig FROM pg_proc WHERE pronamespace = {n}",
    "types": "SELECT t.typname, t.typtype::text, (SELECT array_agg(e.enumlabel ORDER BY e.enumsortorder) "
    "FROM pg_enum e WHERE e.enumtypid = t.oid) FROM pg_type t WHERE t.typnamespace = {n} AND t.typtype = 'e'",
    "sequences": "SELECT s.relname, d.refobjid::regclass::text, d.refobjsubid FROM pg_class s "
    "JOIN pg_depend d ON d.objid = s.oid AND d.deptype = 'a' WHERE s.relkind = 'S' AND s.relnamespace = {n}",
    "triggers": "SELECT tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
    "WHERE c.relnamespace = {n} AND NOT tgisinternal",
}


def catalog(connection: Connection, schema: str = "public", *, but: tuple[str, ...] = ()) -> dict[str, set[str]]:
    """Everything in *schema*, as sets of lines; lines that speak of a name in *but* are left out."""
    found: dict[str, set[str]] = {}
    for what, query in _QUERIES.items():
        rows: Any = connection.execute(text(query.replace("{n}", f"'\"{schema}\"'::regnamespace")))
        lines = {" | ".join(map(str, row)).replace(f"{schema}.", "") for row in rows}
        found[what] = {line for line in lines if not any(name in line for name in but)}
    return found
