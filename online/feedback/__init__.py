"""What users say of answers, kept in a database: no row that was acknowledged is lost.

samples   what is taken, and each refusal by name    errors   what the store raises
database  SQLite or PostgreSQL: opened, migrated, and its faults told in words    tables   what lies in it
group_commit  many callers, one commit    store    adding, forgetting, exporting
"""
