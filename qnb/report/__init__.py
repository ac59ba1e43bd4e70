"""What the rows say: tables, figures, sentences and pages. Nothing here measures or loads a model."""
