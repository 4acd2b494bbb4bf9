BEGIN TRANSACTION;
CREATE TABLE aliases (
    name    TEXT NOT NULL,
    alias   TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (name, alias),
    FOREIGN KEY (name, version) REFERENCES versions ON DELETE CASCADE
);
INSERT INTO "aliases" VALUES('sql','prod',1);
CREATE TABLE contents (
    digest     TEXT PRIMARY KEY,
    state      TEXT NOT NULL,
    error      TEXT NOT NULL,
    facts      TEXT NOT NULL,
    files      TEXT NOT NULL,
    size_bytes INTEGER NOT NULL
);
INSERT INTO "contents" VALUES('sha256:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed','READY','','{"digest": "sha256:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed", "method": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"], "size_bytes": 5, "base_fingerprint": "sha256:base", "matched_modules": ["model.layers.0.self_attn.q_proj"], "delta_norm": 1.5, "dtype": "F32", "parameter_count": 1}','[{"name": "adapter_config.json", "size_bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}, {"name": "adapter_model.safetensors", "size_bytes": 3, "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"}]',5);
INSERT INTO "contents" VALUES('sha256:3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3','FAILED','bit rot','{"digest": "sha256:3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3", "method": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"], "size_bytes": 5, "base_fingerprint": "sha256:base", "matched_modules": ["model.layers.0.self_attn.q_proj"], "delta_norm": 1.5, "dtype": "F32", "parameter_count": 1}','[{"name": "adapter_config.json", "size_bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}, {"name": "adapter_model.safetensors", "size_bytes": 3, "sha256": "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"}]',5);
INSERT INTO "contents" VALUES('sha256:8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f','READY','','{"digest": "sha256:8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f", "method": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj"], "size_bytes": 7, "base_fingerprint": "sha256:base", "matched_modules": ["model.layers.0.self_attn.q_proj"], "delta_norm": 1.5, "dtype": "F32", "parameter_count": 1}','[{"name": "adapter_config.json", "size_bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}, {"name": "adapter_model.safetensors", "size_bytes": 5, "sha256": "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f"}]',7);
CREATE TABLE names (
    name         TEXT PRIMARY KEY,
    last_version INTEGER NOT NULL  -- outlives its versions: a number is never used again
);
INSERT INTO "names" VALUES('sql',3);
INSERT INTO "names" VALUES('other',1);
CREATE TABLE versions (
    name        TEXT NOT NULL REFERENCES names,
    version     INTEGER NOT NULL,
    digest      TEXT NOT NULL REFERENCES contents,
    pinned      INTEGER NOT NULL,
    labels      TEXT NOT NULL,
    description TEXT NOT NULL,
    etag        TEXT NOT NULL,
    created_s   REAL NOT NULL,
    updated_s   REAL NOT NULL,
    PRIMARY KEY (name, version)
);
INSERT INTO "versions" VALUES('sql',1,'sha256:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1,'{"team": "x"}','','67444e0bbc7b1a9d',1.79555504981226778027e+09,1.79555504989649653436e+09);
INSERT INTO "versions" VALUES('sql',2,'sha256:3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0,'{}','','2555896dba76836b',1.79555504984821152686e+09,1.79555504990844655033e+09);
INSERT INTO "versions" VALUES('other',1,'sha256:7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',0,'{}','','6e85acbc01001e52',1.79555504986788725847e+09,1.79555504986788725847e+09);
CREATE INDEX versions_by_digest ON versions (digest);
CREATE INDEX aliases_by_version ON aliases (name, version);
CREATE VIEW records AS
    SELECT v.*, c.state, c.error, c.facts, c.files,
           (SELECT group_concat(a.alias, ' ') FROM aliases a WHERE a.name = v.name AND a.version = v.version)
               AS aliases
    FROM versions v JOIN contents c ON c.digest = v.digest;
COMMIT;
PRAGMA user_version = 1;
