CREATE TABLE `backends` (
	`id` text PRIMARY KEY NOT NULL,
	`url` text NOT NULL,
	`regions` text NOT NULL,
	`weight` real NOT NULL,
	`enabled` integer NOT NULL,
	`created_at_ms` integer NOT NULL,
	`updated_at_ms` integer NOT NULL
);
