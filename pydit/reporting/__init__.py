"""How results are shown: tables on the terminal, figures, self-contained HTML pages."""
