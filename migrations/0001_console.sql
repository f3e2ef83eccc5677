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
ALTER TABLE `events` ADD `request_id` text DEFAULT '' NOT NULL;--> statement-breakpoint
ALTER TABLE `events` ADD `endpoint` text DEFAULT '' NOT NULL;--> statement-breakpoint
ALTER TABLE `events` ADD `status` integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE `events` ADD `error_code` text DEFAULT '' NOT NULL;--> statement-breakpoint
ALTER TABLE `events` ADD `total_ms` real;--> statement-breakpoint
ALTER TABLE `events` ADD `similarity` real;--> statement-breakpoint
ALTER TABLE `events` ADD `source` text DEFAULT '' NOT NULL;--> statement-breakpoint
ALTER TABLE `events` ADD `saved` real;--> statement-breakpoint
CREATE INDEX `events_tenant` ON `events` (`tenant`,`created_at_ms`);--> statement-breakpoint
CREATE INDEX `events_request` ON `events` (`request_id`);--> statement-breakpoint
ALTER TABLE `outcomes` ADD `saved_count` integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE `outcomes` ADD `saved_sum` real DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE `outcomes` ADD `saved_sq` real DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE `publications` ADD `rollout_id` text;--> statement-breakpoint
ALTER TABLE `publications` ADD `paused_at_ms` integer;--> statement-breakpoint
ALTER TABLE `tenants` ADD `texts_kept_days` integer;--> statement-breakpoint
CREATE INDEX `feedback_created` ON `feedback` (`created_at_ms`);