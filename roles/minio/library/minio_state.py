#!/usr/bin/python
"""Ansible module: the buckets, service accounts and users of a running MinIO server."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import urllib3
    from minio import Minio, MinioAdmin
    from minio.credentials.providers import StaticProvider
    from minio.error import MinioAdminException, S3Error

    MISSING = ""
except ImportError as absent:
    MISSING = missing_required_lib(str(absent.name))

DOCUMENTATION = r"""
---
module: minio_state
short_description: Buckets, service accounts and users of a MinIO server
description:
  - Waits until the server is ready, creates missing buckets, and makes every account a service
    account of the root user whose policy allows its own buckets and nothing else.
  - A user is a person. The console admits users and no service accounts; a user's policy allows
    the own buckets, and neither another password nor access keys of one's own.
  - Accounts and users are proven by using them. A wrong secret, policy, state or owner is repaired.
    A user who gets another password loses the sessions that the former one opened.
  - Accounts and users that an earlier run made and that are no longer listed are removed. Buckets
    are never removed, accounts and users made by others are never touched.
options:
  address: {description: Address the server listens on., type: str, required: true}
  port: {description: Port of the S3 interface., type: int, required: true}
  server_name: {description: Name the server's certificate must bear., type: str, required: true}
  ca: {description: PEM file of the authority that signed it., type: path, required: true}
  root_user: {description: Name of the root user., type: str, required: true}
  root_password: {description: Its password., type: str, required: true}
  buckets: {description: Names of the buckets., type: list, elements: str, default: []}
  accounts:
    description: The service accounts.
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Access key., type: str, required: true}
      secret_key: {description: Secret key., type: str, required: true}
      buckets: {description: Its buckets., type: list, elements: str, required: true}
  users:
    description: The users.
    type: list
    elements: dict
    default: []
    suboptions:
      name: {description: Name., type: str, required: true}
      password: {description: Password., type: str, required: true}
      buckets: {description: Buckets of this user., type: list, elements: str, required: true}
  timeout: {description: Seconds to wait for the server., type: int, default: 60}
author: [ODSP]
"""

EXAMPLES = r"""
- name: Give MLflow its bucket
  minio_state:
    address: 192.0.2.10
    port: 9000
    server_name: core-1
    ca: /etc/odsp/tls/ca.crt
    root_user: odsp
    root_password: "{{ minio_root_password }}"
    buckets: [mlflow]
    accounts: [{name: mlflow, secret_key: "{{ secret }}", buckets: [mlflow]}]
    users: [{name: ada, password: "{{ password }}", buckets: [mlflow]}]
"""

RETURN = r"""
actions: {description: What was done or would be done., type: list, elements: str, returned: always}
"""

# Written into every account we make; nothing else is ever removed.
MARK = "odsp"
# A user has no room for a mark. The policy named like this and the user tells it.
USER_POLICY = "odsp-user-"
DESCRIPTION = "Made by the role minio, changes are undone"
BUCKET_ACTIONS = ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"]
OBJECT_ACTIONS = [
    "s3:AbortMultipartUpload",
    "s3:DeleteObject",
    "s3:GetObject",
    "s3:ListMultipartUploadParts",
    "s3:PutObject",
]
STRANGER_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
NOT_READY = "XMinioServerNotInitialized"


class StateError(Exception):
    """What is asked for cannot be had; the text is for the operator."""


def policy_for(buckets: list[str]) -> dict[str, Any]:
    """Return the policy that allows reading and writing these buckets and nothing else."""
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Action": BUCKET_ACTIONS,
                "Resource": [f"arn:aws:s3:::{bucket}" for bucket in sorted(buckets)],
            },
            {
                "Effect": "Allow",
                "Action": OBJECT_ACTIONS,
                "Resource": [f"arn:aws:s3:::{bucket}/*" for bucket in sorted(buckets)],
            },
        ],
    }


def policy_for_user(buckets: list[str]) -> dict[str, Any]:
    """Return the policy of a person, who signs in with the password of the door or not at all."""
    policy = policy_for(buckets)
    # Unless denied, all users may change their own password and make access keys that outlive it.
    policy["Statement"].append({"Effect": "Deny", "Action": ["admin:*"]})
    return policy


def same_policy(one: Any, other: Any) -> bool:
    """Tell whether two policies mean the same; the server keeps their lists in any order."""

    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(value[key]) for key in sorted(value)}
        if isinstance(value, list):
            return sorted((ordered(item) for item in value), key=json.dumps)
        return value

    return json.dumps(ordered(one)) == json.dumps(ordered(other))


class NotServingError(StateError):
    """The server does not answer, or not to this root user."""


class Server:
    """The server as the root user sees it, and as the accounts do."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.address = params["address"]
        if self.address in ("", "0.0.0.0", "::"):
            self.address = "127.0.0.1"
        if ":" in self.address:
            self.address = f"[{self.address}]"
        self.endpoint = f"{self.address}:{params['port']}"
        self.http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=5, read=30),
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=params["ca"],
            server_hostname=params["server_name"],
            assert_hostname=params["server_name"],
        )
        self.root = self.client(params["root_user"], params["root_password"])
        self.admin = MinioAdmin(
            endpoint=self.endpoint,
            credentials=StaticProvider(params["root_user"], params["root_password"]),
            http_client=self.http,
        )

    def client(self, access_key: str, secret_key: str) -> Minio:
        """Return an S3 client; the region is given so that nothing needs to be asked."""
        return Minio(
            self.endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region="us-east-1",
            http_client=self.http,
        )

    def wait(self, seconds: float) -> set[str]:
        """Wait until the server is ready, then return the buckets it has."""
        deadline = time.monotonic() + seconds
        while True:
            problem = ""
            try:
                answer = self.http.request("GET", f"https://{self.endpoint}/minio/health/ready")
                if answer.status == 200:
                    return {bucket.name for bucket in self.root.list_buckets()}
                problem = f"status {answer.status}"
            except urllib3.exceptions.HTTPError as failure:
                problem = str(failure)
            except S3Error as failure:
                if failure.code in STRANGER_CODES:
                    raise NotServingError(
                        f"the server at https://{self.endpoint} refuses the root user"
                        f" '{self.params['root_user']}' ({failure.code})"
                    ) from failure
                problem = f"{failure.code}: {failure.message}"
                if failure.code != NOT_READY:
                    raise NotServingError(problem) from failure
            if time.monotonic() > deadline:
                raise NotServingError(
                    f"MinIO did not become ready at https://{self.endpoint} within {seconds:.0f} s:"
                    f" {problem}; see 'journalctl -u odsp-minio' on this host"
                )
            time.sleep(0.25)

    def account(self, name: str) -> dict[str, Any] | None:
        """Return what the server knows of a service account, or None."""
        try:
            found: dict[str, Any] = json.loads(self.admin.get_service_account(name))
        except MinioAdminException as failure:
            if "XMinioInvalidIAMCredentials" in str(failure):
                return None
            raise
        return found

    def own_accounts(self) -> set[str]:
        """Return the names of the service accounts that this module made."""
        answer = json.loads(self.admin.list_service_account(self.params["root_user"]))
        return {one["accessKey"] for one in answer["accounts"] or [] if one.get("name") == MARK}

    def user(self, name: str) -> dict[str, Any] | None:
        """Return what the server knows of a user, or None."""
        try:
            found: dict[str, Any] = json.loads(self.admin.user_info(name))
        except MinioAdminException as failure:
            if "XMinioAdminNoSuchUser" in str(failure):
                return None
            if "XMinioIAMActionNotAllowed" in str(failure):
                raise StateError(
                    f"a service account '{name}' exists that this role did not make;"
                    " remove it, or choose another name in minio_users"
                ) from failure
            raise
        return found

    def user_policies(self) -> dict[str, Any]:
        """Return the policies of the users that this module made, by the user's name."""
        policies = json.loads(self.admin.policy_list())
        return {
            name.removeprefix(USER_POLICY): policy
            for name, policy in policies.items()
            if name.startswith(USER_POLICY)
        }

    def opens(self, name: str, secret: str, buckets: list[str]) -> bool:
        """Use an account or user: does its secret open each of its buckets?"""
        client = self.client(name, secret)
        try:
            for bucket in buckets:
                # A prefix that no object has: the question matters, not the answer.
                list(client.list_objects(bucket, prefix=".odsp-credential-check/"))
        except S3Error as failure:
            if failure.code in STRANGER_CODES | {"AccessDenied", "NoSuchBucket"}:
                return False
            raise
        return True

    def faults(self, account: dict[str, Any]) -> list[str]:
        """Return what is wrong with an account; 'missing' if it does not exist."""
        found = self.account(account["name"])
        if found is None:
            return ["missing"]
        if found.get("name") != MARK:
            raise StateError(
                f"an account '{account['name']}' exists that this role did not make;"
                " remove it, or choose another name in minio_accounts"
            )
        faults = []
        if found["parentUser"] != self.params["root_user"]:
            faults.append("owner")
        if found["accountStatus"] != "on":
            faults.append("status")
        policy = json.loads(found.get("policy") or "{}")
        if not same_policy(policy, policy_for(account["buckets"])):
            faults.append("policy")
        if not faults and not self.opens(
            account["name"], account["secret_key"], account["buckets"]
        ):
            faults.append("secret")
        return faults

    def user_faults(self, user: dict[str, Any], policy: Any) -> list[str]:
        """Return what is wrong with a user; 'missing' if there is none."""
        name = user["name"]
        found = self.user(name)
        if found is None:
            return ["missing"]
        if policy is None:
            raise StateError(
                f"a user '{name}' exists that this role did not make;"
                " remove it, or choose another name in minio_users"
            )
        faults = []
        if found["status"] != "enabled":
            faults.append("status")
        if found.get("policyName") != USER_POLICY + name or found.get("memberOf"):
            faults.append("rights")
        if not same_policy(policy, policy_for_user(user["buckets"])):
            faults.append("policy")
        if not faults and not self.opens(name, user["password"], user["buckets"]):
            faults.append("password")
        return faults

    def repair(self, account: dict[str, Any], faults: list[str]) -> None:
        """Make an account what it shall be and prove it."""
        name, secret = account["name"], account["secret_key"]
        policy = policy_for(account["buckets"])
        if "owner" in faults:
            self.admin.delete_service_account(name)
        if "owner" in faults or "missing" in faults:
            self.admin.add_service_account(
                access_key=name,
                secret_key=secret,
                name=MARK,
                description=DESCRIPTION,
                policy=policy,
            )
        else:
            # Always with the policy: without it the account would inherit all of root's rights.
            self.admin.update_service_account(
                access_key=name, secret_key=secret, policy=policy, status="on"
            )
        if not self.opens(name, secret, account["buckets"]):
            raise StateError(f"the account '{name}' was written but does not open its buckets")

    def repair_user(self, user: dict[str, Any], faults: list[str]) -> None:
        """Make a user what it shall be and prove it."""
        name, password = user["name"], user["password"]
        # The policy first: a user without one is taken for somebody else's.
        self.admin.policy_add(USER_POLICY + name, policy=policy_for_user(user["buckets"]))
        if faults == ["policy"] and self.opens(name, password, user["buckets"]):
            return
        if "missing" not in faults:
            self.remove_user(name)
        self.admin.user_add(name, password)
        self.admin.policy_set(USER_POLICY + name, user=name)
        if not self.opens(name, password, user["buckets"]):
            raise StateError(f"the user '{name}' was written but does not open the buckets")

    def remove_user(self, name: str) -> None:
        """Remove a user, and the sessions that would come back to life with the next of the name.

        The user's policy stays; while it does, the user is known for one of ours.
        """
        self.admin.user_remove(name)
        try:
            self.admin._url_open(  # noqa: SLF001 - the client has no name for this request
                method="POST",
                command=SimpleNamespace(value="revoke-tokens/builtin"),
                query_params={"user": name, "fullRevoke": "true"},
            )
        except MinioAdminException as failure:
            # An older server that a site brings can only let the sessions run out.
            if "XMinioAdminVersionMismatch" not in str(failure):
                raise


def apply(server: Server, params: dict[str, Any], check_mode: bool) -> list[str]:
    """Bring the server to the wanted state; return what was (or would be) done."""
    actions = []
    present = server.wait(2 if check_mode else params["timeout"])
    for bucket in sorted(set(params["buckets"]) - present):
        actions.append(f"create bucket {bucket}")
        if not check_mode:
            server.root.make_bucket(bucket)
    # Removals first: a name may move from the accounts to the users, or back.
    policies = server.user_policies()
    old_accounts = server.own_accounts() - {account["name"] for account in params["accounts"]}
    old_users = policies.keys() - {user["name"] for user in params["users"]}
    for name in sorted(old_accounts):
        actions.append(f"remove account {name}")
        if not check_mode:
            server.admin.delete_service_account(name)
    for name in sorted(old_users):
        actions.append(f"remove user {name}")
        if not check_mode:
            if server.user(name):
                server.remove_user(name)
            server.admin.policy_remove(USER_POLICY + name)
    for account in params["accounts"]:
        name = account["name"]
        faults = ["missing"] if name in old_users else server.faults(account)
        if faults:
            actions.append(f"write account {name} ({', '.join(faults)})")
            if not check_mode:
                server.repair(account, faults)
    for user in params["users"]:
        name = user["name"]
        gone = name in old_accounts
        faults = ["missing"] if gone else server.user_faults(user, policies.get(name))
        if faults:
            actions.append(f"write user {name} ({', '.join(faults)})")
            if not check_mode:
                server.repair_user(user, faults)
    return actions


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "port": {"type": "int", "required": True},
            "server_name": {"type": "str", "required": True},
            "ca": {"type": "path", "required": True},
            "root_user": {"type": "str", "required": True},
            "root_password": {"type": "str", "required": True, "no_log": True},
            "buckets": {"type": "list", "elements": "str", "default": []},
            "accounts": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "secret_key": {"type": "str", "required": True, "no_log": True},
                    "buckets": {"type": "list", "elements": "str", "required": True},
                },
            },
            "users": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "password": {"type": "str", "required": True, "no_log": True},
                    "buckets": {"type": "list", "elements": "str", "required": True},
                },
            },
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if MISSING:
        module.fail_json(msg=MISSING)
    try:
        actions = apply(Server(module.params), module.params, module.check_mode)
    except StateError as problem:
        if not (module.check_mode and isinstance(problem, NotServingError)):
            module.fail_json(msg=str(problem))
        # A dry run before the server or its new root password is there.
        actions = ["write buckets, accounts and users"]
    except (MinioAdminException, S3Error, urllib3.exceptions.HTTPError) as problem:
        module.fail_json(msg=f"MinIO refused: {problem}")
    module.exit_json(
        changed=bool(actions),
        actions=actions,
        diff={"before": "", "after": "".join(f"{action}\n" for action in actions)},
    )


if __name__ == "__main__":
    main()
