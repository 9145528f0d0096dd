"""Records -> pages and figures, without torch: each page is one HTML file that needs no script and no network."""
