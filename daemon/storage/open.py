"""Chooses the storage that the settings name."""

from __future__ import annotations

from daemon.settings import Settings
from daemon.storage.folder import FolderStorage
from daemon.storage.interface import Storage


def open_storage(settings: Settings) -> Storage:
    """Opens the storage that the settings name. The vendor's client is imported only if it is used."""
    if settings.effective_storage == "folder":
        return FolderStorage(settings.storage_dir, settings.models_bucket)
    from daemon.storage.supabase import SupabaseStorage

    assert settings.supabase_url is not None and settings.supabase_service_role_key is not None
    key = settings.supabase_service_role_key.get_secret_value()
    return SupabaseStorage(settings.supabase_url, key, settings.models_bucket)
