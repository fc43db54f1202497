"""One kit for every page: shell, chart, table, tile; as HTML, Markdown and JSON."""
