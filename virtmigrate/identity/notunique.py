# SPDX-License-Identifier: Apache-2.0
"""What a live clone keeps of its source, by name: nobody can change it from outside."""

KEPT = (
    "random generators inside programs (OpenSSL, libgcrypt, Java, browsers, databases) "
    "that were seeded before",
    "keys, tickets and tokens in the memory of programs, such as TLS session keys",
    "login sessions, and sessions of applications, on this system or on others",
    "connections that were open: their other ends know the source",
    "secrets that the kernel drew once: TCP sequence numbers, hashes, the layout "
    "of its memory, canaries of running programs",
    "machine-id, hostname and boot id that running programs hold in memory",
    "the UUID and serial number of the SMBIOS, as the guest sees them until it is "
    "started anew",
    "UUIDs of partitions, file systems and volume groups",
    "users' SSH keys, passwords, and the keys and registrations of services on disk "
    "(TLS certificates, Kerberos keytabs, agents of configuration management)",
    "logs, mail, histories and temporary files of the source",
)
