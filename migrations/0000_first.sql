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
	FOREIGN KEY (`tenant_id`) REFERENCES `tenants`(`id`) ON UPDATE no action ON DELETE no action
);
--> statement-breakpoint
CREATE UNIQUE INDEX `api_keys_sha256_unique` ON `api_keys` (`sha256`);--> statement-breakpoint
CREATE INDEX `api_keys_tenant` ON `api_keys` (`tenant_id`);--> statement-breakpoint
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
	`bits` text NOT NULL
);
--> statement-breakpoint
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
	`created_at_ms` integer NOT NULL
);
--> statement-breakpoint
CREATE UNIQUE INDEX `publications_id_unique` ON `publications` (`id`);--> statement-breakpoint
CREATE INDEX `publications_tenant` ON `publications` (`tenant`,`sequence`);--> statement-breakpoint
CREATE TABLE `tenants` (
	`id` text PRIMARY KEY NOT NULL,
	`name` text NOT NULL,
	`routing_policy` text NOT NULL,
	`created_at_ms` integer NOT NULL
);
