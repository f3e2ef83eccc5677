CREATE TABLE `api_keys` (
	`id` text PRIMARY KEY NOT NULL,
	`kind` text NOT NULL,
	`tenant_id` text,
	`name` text NOT NULL,
	`prefix` text NOT NULL,
	`sha256` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`expires_at_ms` integer,
	`revoked_at_ms` integer,
	`replaced_by` text,
	FOREIGN KEY (`tenant_id`) REFERENCES `tenants`(`id`) ON UPDATE no action ON DELETE no action
);
--> statement-breakpoint
CREATE UNIQUE INDEX `api_keys_sha256_unique` ON `api_keys` (`sha256`);--> statement-breakpoint
CREATE INDEX `api_keys_tenant` ON `api_keys` (`tenant_id`);--> statement-breakpoint
CREATE TABLE `audit_log` (
	`sequence` integer PRIMARY KEY AUTOINCREMENT NOT NULL,
	`created_at_ms` integer NOT NULL,
	`tenant` text NOT NULL,
	`actor` text NOT NULL,
	`address` text NOT NULL,
	`action` text NOT NULL,
	`target` text NOT NULL,
	`before` text,
	`after` text,
	`request_id` text NOT NULL
);
--> statement-breakpoint
CREATE INDEX `audit_log_created` ON `audit_log` (`created_at_ms`);--> statement-breakpoint
CREATE INDEX `audit_log_tenant` ON `audit_log` (`tenant`,`sequence`);--> statement-breakpoint
CREATE TABLE `backend_latencies` (
	`minute` integer NOT NULL,
	`backend` text NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`minute`, `backend`, `measure`, `bucket`)
);
--> statement-breakpoint
CREATE TABLE `backends` (
	`id` text PRIMARY KEY NOT NULL,
	`url` text NOT NULL,
	`regions` text NOT NULL,
	`weight` real NOT NULL,
	`enabled` integer NOT NULL,
	`created_at_ms` integer NOT NULL,
	`updated_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE TABLE `ended_sessions` (
	`subject` text PRIMARY KEY NOT NULL,
	`ended_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE INDEX `ended_sessions_time` ON `ended_sessions` (`ended_at_ms`);--> statement-breakpoint
CREATE TABLE `evaluations` (
	`owner` text NOT NULL,
	`version` text NOT NULL,
	`content` text NOT NULL,
	`content_bytes` integer NOT NULL,
	`updated_at_ms` integer NOT NULL,
	PRIMARY KEY(`owner`, `version`)
);
--> statement-breakpoint
CREATE TABLE `events` (
	`id` text PRIMARY KEY NOT NULL,
	`batch` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`day` text NOT NULL,
	`key_id` text NOT NULL,
	`tenant` text NOT NULL,
	`model` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`mask` text NOT NULL,
	`sparsity` real NOT NULL,
	`fallback` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`failures` integer NOT NULL,
	`ttft_ms` real,
	`tpot_ms` real,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`rating` integer,
	`agreement` real,
	`ttft_bucket` integer,
	`tpot_bucket` integer,
	`backend` text DEFAULT '' NOT NULL,
	`outages` integer DEFAULT 0 NOT NULL,
	`experiment_owner` text DEFAULT '' NOT NULL,
	`request_id` text DEFAULT '' NOT NULL,
	`endpoint` text DEFAULT '' NOT NULL,
	`status` integer DEFAULT 0 NOT NULL,
	`error_code` text DEFAULT '' NOT NULL,
	`total_ms` real,
	`similarity` real,
	`source` text DEFAULT '' NOT NULL,
	`saved` real
);
--> statement-breakpoint
CREATE INDEX `events_batch` ON `events` (`batch`);--> statement-breakpoint
CREATE INDEX `events_created` ON `events` (`created_at_ms`);--> statement-breakpoint
CREATE INDEX `events_tenant` ON `events` (`tenant`,`created_at_ms`);--> statement-breakpoint
CREATE INDEX `events_request` ON `events` (`request_id`);--> statement-breakpoint
CREATE TABLE `experiments` (
	`owner` text NOT NULL,
	`id` text NOT NULL,
	`definition` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`starts_at_ms` integer,
	`ends_at_ms` integer,
	`stopped_at_ms` integer,
	`revision` integer NOT NULL,
	`actor` text NOT NULL,
	PRIMARY KEY(`owner`, `id`)
);
--> statement-breakpoint
CREATE TABLE `feedback` (
	`tenant_id` text NOT NULL,
	`api_key_id` text NOT NULL,
	`completion_id` text NOT NULL,
	`rating` integer NOT NULL,
	`comment` text,
	`created_at_ms` integer NOT NULL,
	PRIMARY KEY(`tenant_id`, `completion_id`, `api_key_id`)
);
--> statement-breakpoint
CREATE INDEX `feedback_created` ON `feedback` (`created_at_ms`);--> statement-breakpoint
CREATE TABLE `latencies` (
	`minute` integer NOT NULL,
	`tenant` text NOT NULL,
	`version` text NOT NULL,
	`sparsity` real NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`minute`, `tenant`, `version`, `sparsity`, `measure`, `bucket`)
);
--> statement-breakpoint
CREATE TABLE `live` (
	`tenant` text PRIMARY KEY NOT NULL,
	`publication_id` text NOT NULL,
	FOREIGN KEY (`publication_id`) REFERENCES `publications`(`id`) ON UPDATE no action ON DELETE no action
);
--> statement-breakpoint
CREATE TABLE `mask_sets` (
	`owner` text NOT NULL,
	`version` text NOT NULL,
	`name` text NOT NULL,
	`model_name` text NOT NULL,
	`model_hash` text NOT NULL,
	`encoder` text NOT NULL,
	`cluster_count` integer NOT NULL,
	`reached_sparsity` real NOT NULL,
	`content` text NOT NULL,
	`content_bytes` integer NOT NULL,
	`created_at_ms` integer NOT NULL,
	PRIMARY KEY(`owner`, `version`)
);
--> statement-breakpoint
CREATE TABLE `masks` (
	`id` text PRIMARY KEY NOT NULL,
	`model_hash` text NOT NULL,
	`block_count` integer NOT NULL,
	`bits` text NOT NULL,
	`surrogates` text
);
--> statement-breakpoint
CREATE TABLE `outcomes` (
	`minute` integer NOT NULL,
	`tenant` text NOT NULL,
	`model` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`mask` text NOT NULL,
	`sparsity` real NOT NULL,
	`fallback` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`ttft_count` integer NOT NULL,
	`ttft_sum` real NOT NULL,
	`ttft_sq` real NOT NULL,
	`tpot_count` integer NOT NULL,
	`tpot_sum` real NOT NULL,
	`tpot_sq` real NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`completion_tokens_sq` real NOT NULL,
	`ratings` integer NOT NULL,
	`ratings_up` integer NOT NULL,
	`agreement_count` integer NOT NULL,
	`agreement_sum` real NOT NULL,
	`agreement_sq` real NOT NULL,
	`outages` integer DEFAULT 0 NOT NULL,
	`saved_count` integer DEFAULT 0 NOT NULL,
	`saved_sum` real DEFAULT 0 NOT NULL,
	`saved_sq` real DEFAULT 0 NOT NULL,
	PRIMARY KEY(`minute`, `tenant`, `model`, `version`, `cluster`, `mask`, `sparsity`, `fallback`, `experiment`, `variant`, `region`)
);
--> statement-breakpoint
CREATE INDEX `outcomes_version` ON `outcomes` (`version`,`minute`);--> statement-breakpoint
CREATE INDEX `outcomes_tenant` ON `outcomes` (`tenant`,`minute`);--> statement-breakpoint
CREATE TABLE `publications` (
	`sequence` integer PRIMARY KEY AUTOINCREMENT NOT NULL,
	`id` text NOT NULL,
	`tenant` text NOT NULL,
	`owner` text NOT NULL,
	`version` text NOT NULL,
	`replaced_version` text,
	`previous_id` text,
	`action` text NOT NULL,
	`actor` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`activate_at_ms` integer,
	`rollout` text,
	`auto_rollback` text,
	`reason` text,
	`rollout_id` text,
	`paused_at_ms` integer
);
--> statement-breakpoint
CREATE UNIQUE INDEX `publications_id_unique` ON `publications` (`id`);--> statement-breakpoint
CREATE INDEX `publications_tenant` ON `publications` (`tenant`,`sequence`);--> statement-breakpoint
CREATE TABLE `tenants` (
	`id` text PRIMARY KEY NOT NULL,
	`name` text NOT NULL,
	`routing_policy` text NOT NULL,
	`created_at_ms` integer NOT NULL,
	`enabled` integer DEFAULT true NOT NULL,
	`models` text,
	`sparsity_max` real,
	`requests_per_minute` integer,
	`tokens_per_minute` integer,
	`requests_per_day` integer,
	`tokens_per_day` integer,
	`agreement_min` real,
	`texts_kept_days` integer
);
--> statement-breakpoint
CREATE TABLE `texts` (
	`event` text PRIMARY KEY NOT NULL,
	`tenant` text NOT NULL,
	`expires_at_ms` integer NOT NULL,
	`prompt` text NOT NULL,
	`answer` text NOT NULL
);
--> statement-breakpoint
CREATE INDEX `texts_expires` ON `texts` (`expires_at_ms`);--> statement-breakpoint
CREATE INDEX `texts_tenant` ON `texts` (`tenant`);--> statement-breakpoint
CREATE TABLE `traffic_samples` (
	`id` integer PRIMARY KEY AUTOINCREMENT NOT NULL,
	`tenant` text NOT NULL,
	`version` text NOT NULL,
	`cluster` integer NOT NULL,
	`distances` text NOT NULL,
	`created_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE INDEX `traffic_samples_tenant` ON `traffic_samples` (`tenant`,`id`);--> statement-breakpoint
CREATE INDEX `traffic_samples_version` ON `traffic_samples` (`version`,`id`);--> statement-breakpoint
CREATE TABLE `usage` (
	`tenant_id` text NOT NULL,
	`day` text NOT NULL,
	`model` text NOT NULL,
	`mask` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	PRIMARY KEY(`tenant_id`, `day`, `model`, `mask`)
);
--> statement-breakpoint
CREATE TABLE `variant_latencies` (
	`experiment_owner` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`measure` text NOT NULL,
	`bucket` integer NOT NULL,
	`count` integer NOT NULL,
	PRIMARY KEY(`experiment_owner`, `experiment`, `variant`, `region`, `measure`, `bucket`)
);
--> statement-breakpoint
CREATE TABLE `variant_outcomes` (
	`experiment_owner` text NOT NULL,
	`experiment` text NOT NULL,
	`variant` text NOT NULL,
	`region` text NOT NULL,
	`requests` integer NOT NULL,
	`errors` integer NOT NULL,
	`ttft_count` integer NOT NULL,
	`ttft_sum` real NOT NULL,
	`ttft_sq` real NOT NULL,
	`tpot_count` integer NOT NULL,
	`tpot_sum` real NOT NULL,
	`tpot_sq` real NOT NULL,
	`prompt_tokens` integer NOT NULL,
	`completion_tokens` integer NOT NULL,
	`completion_tokens_sq` real NOT NULL,
	`ratings` integer NOT NULL,
	`ratings_up` integer NOT NULL,
	`agreement_count` integer NOT NULL,
	`agreement_sum` real NOT NULL,
	`agreement_sq` real NOT NULL,
	PRIMARY KEY(`experiment_owner`, `experiment`, `variant`, `region`)
);
