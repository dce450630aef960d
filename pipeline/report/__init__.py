"""Parts of every report page: tables, pictures, intervals and the HTML around them."""
