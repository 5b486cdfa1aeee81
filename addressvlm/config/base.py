"""What every section of the configuration tree has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the tree: unknown keys are errors, values don't change type silently."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())
