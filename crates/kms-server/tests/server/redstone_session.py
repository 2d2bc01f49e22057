"""Drives a key service with IBM's client as an application would. Run by redstone.rs."""

import os

from redstone import auth
from redstone.client import KeyProtect

client = KeyProtect(
    credentials=auth.TokenManager(os.environ["KMS_API_KEY"], iam_endpoint=os.environ["KMS_IAM_URL"]),
    region="us-south",
    service_instance_id=os.environ["KMS_INSTANCE_ID"],
    endpoint_url=os.environ["KMS_URL"],
)


def refused(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except KeyProtect.KeyProtectError as error:
        assert code in str(error), error
    else:
        raise AssertionError(f"{call.__name__} was not refused with {code}")


key = client.create_key(name="made by redstone", root=True)
assert key["state"] == 1 and key["extractable"] is False, key
assert client.get_key(key["id"]) == key

secret, aad = b"this is my plaintext", ["python-keyprotect"]
wrapped = client.wrap(key["id"], secret, aad=aad)
assert "plaintext" not in wrapped, wrapped
assert client.unwrap(key["id"], wrapped["ciphertext"], aad=aad) == secret
refused("UNPROCESSABLE_CIPHERTEXT_ERR", client.unwrap, key["id"], wrapped["ciphertext"], aad=["other"])

made = client.wrap(key["id"], None)
assert client.unwrap(key["id"], made["ciphertext"]) is not None and len(made["plaintext"]) == 44

client.rotate_key(key["id"])
assert client.unwrap(key["id"], wrapped["ciphertext"], aad=aad) == secret
again = client.wrap(key["id"], secret)
assert again["keyVersion"]["id"] != wrapped["keyVersion"]["id"]

brought = client.create_key(name="brought", root=True, payload=b"0" * 16)
assert brought["imported"] is True
refused("KEY_PAYLOAD_REQ_ERR", client.rotate_key, brought["id"])
client.rotate_key(brought["id"], payload=b"1" * 32)
assert {k["id"] for k in client.list_keys()} == {key["id"], brought["id"]}

client.delete_key(key["id"])
refused("KEY_DELETED_ERR", client.unwrap, key["id"], wrapped["ciphertext"], aad=aad)
refused("KEY_DELETED_ERR", client.delete_key, key["id"])
refused("NOT_IMPLEMENTED", client.create_key, name="a standard key")
refused("KEY_NOT_FOUND_ERR", client.get_key, "00000000-0000-4000-8000-000000000000")
print("all done")
